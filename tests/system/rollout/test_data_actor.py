"""DataActor on a real Ray: an image is stored once, prompts carry references, reading ahead changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rollout.data.options import DataOptions
from rollout.data.source import DataError, PromptSource
from rollout.types import Prompt, StoredPrompt
from tests.helpers.data_helpers import fake_adapter, options_of, png, write_rows

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """20 rows over 4 distinct images; row 9 is refused."""
    path = tmp_path_factory.mktemp("data") / "a.parquet"
    rows = [{"prompt": f"row {n}", "image": png(COLOURS[n % 4]), "answer": "a" if n != 9 else None} for n in range(20)]
    return options_of(write_rows(path, rows), max_refused_share=0.05)


@pytest.fixture(scope="module")
def make(local_ray: ModuleType) -> Callable[..., Any]:
    """A DataActor in this process, which owns its objects like an actor's."""
    from rollout.data.actor import DataActor

    def make(*args: Any, **kwargs: Any) -> DataActor:
        actor = DataActor(fake_adapter, *args, **kwargs)
        actor.start()
        return actor

    return make


def contents(stored: list[StoredPrompt]) -> list[Prompt]:
    import ray

    prompts = ray.get([s.prompt for s in stored], timeout=60)
    assert [p.ref for p in prompts] == [s.ref for s in stored]
    return prompts


def identity(prompts: list[Prompt]) -> list[tuple[Any, str, list[str]]]:
    return [(p.ref, p.text, [m.digest for m in p.media]) for p in prompts]


def test_an_image_crosses_the_store_once_and_outlives_its_place_in_the_cache(
    local_ray: ModuleType, options: DataOptions
) -> None:
    """A real actor that keeps nothing: what the driver holds stays alive, also in a third process."""
    from rollout.data.actor import DataActor

    ray = local_ray
    actor = ray.remote(DataActor).options(num_cpus=0).remote(fake_adapter, options, None, 0)
    assert ray.get(actor.start.remote(), timeout=120) == 20
    (prompt, *others) = contents(ray.get(actor.take.remote(20), timeout=60)[0])
    assert isinstance(prompt.media[0].data, ray.ObjectRef)
    ray.get(actor.take.remote(20), timeout=60)  # more evictions
    ray.get(actor.read.remote([]), timeout=60)  # waits for what is read ahead

    @ray.remote(num_cpus=0)
    def resolve(prompts: list[Prompt]) -> list[bytes]:
        return ray.get([p.media[0].data for p in prompts], timeout=30)

    del others
    expected = png(COLOURS[prompt.ref.row % 4])
    assert ray.get(prompt.media[0].data, timeout=30) == expected
    assert ray.get(resolve.remote([prompt]), timeout=60) == [expected]
    report = ray.get(actor.report.remote(), timeout=30)
    assert report.media_bytes == 0
    assert report.train.refused == {"no answer": 1}
    ray.kill(actor)


def test_data_errors_reach_the_driver_as_what_they_are(local_ray: ModuleType, tmp_path: Path) -> None:
    from rollout.data.actor import DataActor

    actor = local_ray.remote(DataActor).options(num_cpus=0).remote(fake_adapter, options_of(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        local_ray.get(actor.start.remote(), timeout=120)
    local_ray.kill(actor)


def test_equal_images_share_one_reference(
    make: Callable[..., Any], local_ray: ModuleType, options: DataOptions
) -> None:
    actor = make(options)
    prompts = contents(actor.take(19)[0])
    references: dict[str, set[Any]] = {}
    for prompt in prompts:
        references.setdefault(prompt.media[0].digest, set()).add(prompt.media[0].data)
        assert local_ray.get(prompt.media[0].data) == png(COLOURS[prompt.ref.row % 4])
    assert len(references) == 4
    assert all(len(same) == 1 for same in references.values())
    report = actor.report()
    assert report.media_puts == 4
    assert report.media_bytes == sum(len(png(colour)) for colour in COLOURS)


def test_prompts_carry_no_pixels(make: Callable[..., Any], tmp_path: Path, local_ray: ModuleType) -> None:
    noise = bytes(range(256)) * 4000
    path = write_rows(tmp_path / "a.parquet", [{"prompt": "q", "image": png() + noise, "answer": "a"}])
    (prompt,) = contents(make(options_of(path)).take(1)[0])
    assert local_ray.get(prompt.media[0].data) == png() + noise
    bare = local_ray.cloudpickle.dumps(prompt.media[0].data)
    assert len(local_ray.cloudpickle.dumps(prompt)) < len(bare) + 2000


def test_kept_references_are_bounded_in_bytes(make: Callable[..., Any], options: DataOptions) -> None:
    size = len(png("red"))
    actor = make(options, media_bytes=2 * size)
    actor.take(19)
    actor.read([])  # waits for what is read ahead
    assert actor.report().media_bytes <= 2 * size
    assert actor.report().media_puts > 4


def test_reading_ahead_changes_neither_order_nor_state(make: Callable[..., Any], options: DataOptions) -> None:
    expected = identity(PromptSource(options, fake_adapter()).take(40))
    actor, got = make(options), []
    for n in (3, 1, 0, 7, 12):
        got += contents(actor.take(n)[0])
        state = pickle.loads(pickle.dumps(actor.take(0)[1]))
        actor.read([])  # waits for what is read ahead
        if n in (1, 7):
            actor = make(options)
            actor.load_state(state)
    assert identity(got) == expected[:23]
    actor.load_state(None)
    assert identity(contents(actor.take(40)[0])) == expected


def test_read_puts_the_media_again(make: Callable[..., Any], local_ray: ModuleType, options: DataOptions) -> None:
    actor = make(options)
    (first,) = contents(actor.take(1)[0])
    (again,) = contents(actor.read([first.ref.retry()]))
    assert again.ref == first.ref.retry()
    assert again.media[0].data != first.media[0].data
    assert local_ray.get(again.media[0].data) == local_ray.get(first.media[0].data)
    assert identity(contents(actor.take(5)[0])) == identity(PromptSource(options, fake_adapter()).take(6))[1:]
    whole = contents(actor.read([p.ref for p in PromptSource(options, fake_adapter()).take(19)]))
    assert len({p.media[0].data for p in whole}) == 4, "also what is read again crosses the store once"


def test_eval_prompts_are_the_same_at_every_call(make: Callable[..., Any], options: DataOptions) -> None:
    actor = make(options, options)
    actor.take(2)
    prompts = contents([prompt for prompt, _ in actor.held_out(7)])
    assert identity(prompts) == identity(list(PromptSource(options, fake_adapter()).one_epoch(7)))
    assert identity(contents([prompt for prompt, _ in actor.held_out(7)])) == identity(prompts)
    assert {name for _, name in actor.held_out(7)} == {"all"}
    assert {name for _, name in actor.held_out(7, "kind")} == {"none"}
    assert len(actor.held_out()) == 19
    assert actor.report().media_puts == 4
    assert actor.report().evaluation.refused == {"no answer": 1}
    with pytest.raises(DataError, match="no held-out data"):
        make(options).held_out()


def test_too_many_refused_rows_stop_every_take_and_lose_nothing(make: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "answer": "a" if n < 10 else None} for n in range(50)]
    path = write_rows(tmp_path / "a.parquet", rows)
    actor = make(options_of(path, shuffle=False))
    assert len(actor.take(4)[0]) == 4
    for _ in range(2):
        with pytest.raises(DataError, match=r"more than 1\.00% of the rows were refused"):
            actor.take(10)
    assert actor._state["position"] == 4
