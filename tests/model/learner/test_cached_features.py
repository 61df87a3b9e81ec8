"""Cached features of frozen towers: each runs once for each distinct item, and updates are those of towers that run."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import learner.batching.rows
import learner.features.frozen_towers
from learner.config import Behavior, PpoClip
from learner.engines.checkpoint import load_checkpoint, save_checkpoint
from learner.engines.torch_engine import TorchEngine
from learner.features.cache import FeatureCache
from learner.features.frozen_towers import FrozenTowers, make_towers
from learner.types import EncodingMismatchError, LearnerOptions
from tests.contracts.train_engine_contract import assert_gradients_close, gradients_of
from tests.helpers import learner_cases
from tests.helpers.learner_cases import (
    ROUNDED,
    Case,
    adapter_of,
    changed,
    exact_dtype,
    make_case,
    make_group,
    options,
    updater,
)
from tests.unit.learner.test_features import MemoryStore
from vlm.adapter import MultimodalAdapter
from vlm.config import Lora
from vlm.media.video_audio import decode
from vlm.tiny import TINY, build_tiny

pytestmark = pytest.mark.usefixtures("logits_in_several_chunks")

FAMILIES = ("internvl", "llava_next", "qwen2_5_omni")
OTHERS = sorted(set(TINY) - {*FAMILIES, "llama", "qwen2", "qwen3"})
MIXES = (["image"], [], ["image"] * 3)
TOWERS = ("vision", "audio", "projector")


@functools.cache
def model_of(family: str) -> Path:
    return build_tiny(family, Path(tempfile.mkdtemp(prefix="saccade-")) / family)


def without(adapter: MultimodalAdapter, roles: Collection[str] = TOWERS) -> MultimodalAdapter:
    """The adapter of the same family in which nothing of `roles` is ever trained."""
    own = copy.copy(adapter)
    own.is_used = lambda name: adapter.role(name) not in roles and adapter.is_used(name)  # type: ignore[method-assign]
    return own


def case_of(adapter: MultimodalAdapter, seed: int = 0) -> Case:
    """One image, text, three images of which the first is that one image, and one of everything that the family takes.
    The ratio is against random log-probabilities, so that the loss depends on what the model computes."""
    mixes = [["image"], [], ["image"] * 3, list(adapter.modalities)]
    groups = [make_group(adapter, seed + i, media=own, scores=[0.0, 1.0, 0.5]) for i, own in enumerate(mixes)]
    shared, third = groups[0].prompt.media[0], groups[2].prompt
    groups[2] = replace(groups[2], prompt=replace(third, media=(shared, *third.media[1:])))
    return make_case(groups)


def distinct_items(*cases: Case) -> set[str]:
    return {m.digest for case in cases for g in case.groups for m in g.prompt.media}


def options_of(model: Path, **changes: Any) -> LearnerOptions:
    wide = {"off_policy": Behavior(), "loss": PpoClip(low=1.0, high=100.0), "micro_batch": 600}
    return options(model, **{"media_kinds": tuple(adapter_of(model).modalities), **wide, **changes})


def update(engine: Any, chosen: LearnerOptions, case: Case, towers: FrozenTowers | None) -> dict[str, Any]:
    stats = learner_cases.update(engine, chosen, case, towers=towers)
    return {name: value for name, value in stats.items() if name != "seconds"}


def make(chosen: LearnerOptions, adapter: MultimodalAdapter, cached: bool = True) -> tuple[Any, FrozenTowers | None]:
    engine = TorchEngine(chosen, adapter)
    return engine, make_towers(engine, adapter, chosen) if cached else None


def count_runs(engine: Any) -> Counter[str]:
    """Forward calls, from now on, of whatever belongs to a tower or a projector: of the policy and of the reference."""
    counts: Counter[str] = Counter()

    def watch(whose: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: counts.update([whose]))

    for whose, policy in (("policy", engine.policy), ("reference", engine._reference)):
        for name, module in policy.base.named_modules() if policy is not None else ():
            if engine.adapter.role(f"{name}.") in TOWERS:
                watch(whose, module)
    return counts


def strip(stats: dict[str, Any]) -> dict[str, Any]:
    """What does not tell about the cache."""
    metrics = {name: value for name, value in stats["metrics"].items() if not name.startswith("feature")}
    return {**stats, "metrics": metrics}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_updates_scores_and_divergences_are_those_of_towers_that_run_in_every_pass(family: str) -> None:
    """And after the first update no tower ever runs, neither the policy's nor (at all) the reference's. In float64: see
    `test_cached_tower_outputs`."""
    adapter = without(adapter_of(model_of(family)))
    chosen = options_of(model_of(family), dtype=exact_dtype(model_of(family)))
    case = case_of(adapter)
    plain, _ = make(chosen, adapter, cached=False)
    engine, towers = make(chosen, adapter)
    assert towers is not None and towers.cached.features == tuple(adapter.towers())
    runs = count_runs(engine)
    first, expected = update(engine, chosen, case, towers), update(plain, chosen, case, None)
    assert first["metrics"]["features_computed"] == len(distinct_items(case)) and runs["policy"] > 0
    runs.clear()
    assert_same(strip(first), expected)
    assert_gradients_close(gradients_of(engine, chosen), gradients_of(plain, chosen))
    given, both = (case.groups, case.media), (updater(engine, chosen, towers), updater(plain, chosen))
    flat, flat_exact = ([x for group in u.score(*given) for row in group for x in row.tolist()] for u in both)
    assert flat == pytest.approx(flat_exact, rel=ROUNDED)
    for ours, exact in zip(*(u.reference_kl(*given) for u in both), strict=True):
        assert ours == pytest.approx(exact, rel=ROUNDED, abs=ROUNDED)
    second = update(engine, chosen, case, towers)
    assert_same(strip(second), update(plain, chosen, case, None))
    assert second["metrics"]["features_computed"] == 0
    assert second["metrics"]["features_reused"] == 3 * len(distinct_items(case))  # score, divergence, update
    assert not runs and second["metrics"]["kl"] > 0


def assert_same(ours: Any, exact: Any) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        if isinstance(value, dict):
            assert_same(ours[name], value)
        else:
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_other_images_are_other_features(family: str) -> None:
    """The comparisons above would see features that stand for another image, or in another order."""
    adapter, chosen = without(adapter_of(model_of(family))), options_of(model_of(family))
    case = case_of(adapter)
    (engine, towers), (other, wrong) = make(chosen, adapter), make(chosen, adapter)
    assert towers is not None and wrong is not None
    right = engine.run_towers

    def mixed_up(batch: Any) -> Any:
        return {kind: [tuple(t.flip(-2) for t in row) for row in rows] for kind, rows in right(batch).items()}

    other.run_towers = mixed_up
    first, second = update(engine, chosen, case, towers), update(other, chosen, case, wrong)
    assert abs(first["loss"] - second["loss"]) > 1e-4


def test_the_tower_runs_once_for_each_distinct_image_of_a_run() -> None:
    """Of three cases of which two share their images, and one batch holds one image twice."""
    adapter, chosen = without(adapter_of(model_of("qwen2_5_vl"))), options_of(model_of("qwen2_5_vl"))
    engine, towers = make(chosen, adapter)
    cases = [case_of(adapter), case_of(adapter, 40), case_of(adapter)]
    computed: list[int] = []
    run = engine.run_towers

    def counted(batch: Any) -> Any:
        features = run(batch)
        computed.append(sum(map(len, features.values())))
        return features

    engine.run_towers = counted
    metrics = [update(engine, chosen, case, towers)["metrics"] for case in cases]
    assert sum(computed) == len(distinct_items(*cases)) == sum(m["features_computed"] for m in metrics)
    assert [m["features_computed"] for m in metrics] == [5, 5, 0]


def test_an_image_whose_features_are_there_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, chosen = without(adapter_of(model_of("qwen2_5_vl"))), options_of(model_of("qwen2_5_vl"))
    engine, towers = make(chosen, adapter)
    case, decoded = case_of(adapter), list[str]()
    for module in (learner.batching.rows, learner.features.frozen_towers):
        monkeypatch.setattr(module, "decode", lambda item, data: decoded.append(item.digest) or decode(item, data))
    update(engine, chosen, case, towers)
    assert set(decoded) == distinct_items(case)
    decoded.clear()
    update(engine, chosen, case, towers)
    assert not decoded
    wrong = replace(case.groups[0], prompt_token_ids=case.groups[0].prompt_token_ids[::-1].copy())
    with pytest.raises(EncodingMismatchError):
        update(engine, chosen, replace(case, groups=[wrong, *case.groups[1:]]), towers)


@pytest.mark.parametrize("patches", [100, None])
def test_tower_batches_are_limited(monkeypatch: pytest.MonkeyPatch, patches: int | None) -> None:
    adapter = without(adapter_of(model_of("qwen2_5_vl")))
    chosen = options_of(model_of("qwen2_5_vl"))
    engine, towers = make(chosen, adapter)
    if patches:
        monkeypatch.setattr(
            towers, "_per_token", dict.fromkeys(adapter.modalities, patches / chosen.micro_batch.tokens)
        )
    sizes: list[int] = []
    run = engine.run_towers

    def measured(batch: Any) -> Any:
        sizes.extend(len(batch.model_kwargs()[name]) for name in ("pixel_values",) if batch.pixel_values is not None)
        return run(batch)

    engine.run_towers = measured
    update(engine, chosen, case_of(adapter), towers)
    assert (max(sizes) <= 100 and len(sizes) > 1) if patches else len(sizes) == 1


@pytest.mark.parametrize(("in_store", "computed"), [(0, 5), (2**30, 0)])
def test_what_has_left_memory_comes_back_or_is_computed_again(in_store: int, computed: int) -> None:
    adapter, chosen = without(adapter_of(model_of("qwen3_vl"))), options_of(model_of("qwen3_vl"))
    plain, _ = make(chosen, adapter, cached=False)
    engine, _ = make(chosen, adapter)
    towers = FrozenTowers(engine, adapter, chosen, FeatureCache(0, MemoryStore(in_store)))
    case = case_of(adapter)
    for number in range(3):
        stats = update(engine, chosen, case, towers)
        assert_same(strip(stats), update(plain, chosen, case, None))
        assert stats["metrics"]["features_computed"] == (computed if number else 5)
        assert stats["metrics"]["features_from_store"] == (0 if in_store == 0 or not number else 5)


@pytest.mark.parametrize("choice", [{"freeze": ("vision", "projector")}, {"lora": Lora(2)}])
def test_features_of_what_the_options_leave_untrained_are_cached(choice: dict[str, Any]) -> None:
    adapter, chosen = adapter_of(model_of("llava_next")), options_of(model_of("llava_next"), **choice)
    plain, _ = make(chosen, adapter, cached=False)
    engine, towers = make(chosen, adapter)
    assert towers is not None and towers.cached.features == ("image",)
    for _ in range(2):
        stats = update(engine, chosen, case_of(adapter), towers)
        assert_same(strip(stats), update(plain, chosen, case_of(adapter), None))
    trained = {adapter.role(name) for name, p in engine.policy.base.named_parameters() if p.requires_grad}
    assert trained == {"language"} and stats["metrics"]["features_reused"] == len(distinct_items(case_of(adapter)))


def test_there_is_no_cache_where_a_tower_is_trained() -> None:
    model = model_of("qwen2_5_vl")
    adapter, chosen = adapter_of(model), options_of(model)
    for frozen in ((), ("projector",), ("language",)):
        assert make(changed(chosen, freeze=frozen), adapter)[1] is None, frozen
    assert make(changed(chosen, feature_cache_gib=0.0), without(adapter))[1] is None
    assert make(changed(chosen, media_kinds=()), without(adapter))[1] is None


def test_one_tower_may_be_trained_beside_another_that_is_not() -> None:
    adapter = without(adapter_of(model_of("qwen2_5_omni")), ("vision", "projector"))
    chosen = options_of(model_of("qwen2_5_omni"))
    plain, _ = make(chosen, adapter, cached=False)
    engine, towers = make(chosen, adapter)
    assert towers is not None and towers.cached.features == ("image", "video")
    for _ in range(2):
        assert_same(
            strip(update(engine, chosen, case_of(adapter), towers)), update(plain, chosen, case_of(adapter), None)
        )


@pytest.mark.parametrize("changes", [{"lora": Lora(2)}, {"freeze": ("vision", "projector")}], ids=["lora", "frozen"])
def test_checkpointed_layers_leave_a_tower_frozen(changes: dict[str, Any]) -> None:
    adapter = adapter_of(model_of("qwen2_5_vl"))
    chosen = options_of(model_of("qwen2_5_vl"), gradient_checkpointing=("language", "vision"), **changes)
    engine, towers = make(chosen, adapter)
    assert towers is not None and towers.cached.features == ("image", "video")
    plain, _ = make(chosen, adapter, cached=False)
    for _ in range(2):
        assert_same(
            strip(update(engine, chosen, case_of(adapter), towers)), update(plain, chosen, case_of(adapter), None)
        )


def test_a_tower_that_is_trained_against_what_the_roles_say_is_an_error() -> None:
    adapter = without(adapter_of(model_of("qwen2_5_vl")))
    engine, towers = make(options_of(model_of("qwen2_5_vl")), adapter)
    assert towers is not None
    engine.policy.base.model.visual.patch_embed.requires_grad_(True)
    with pytest.raises(RuntimeError, match="counts as frozen, but its features depend on a parameter"):
        towers.encode(case_of(adapter).groups, case_of(adapter).media)


def test_a_resumed_run_goes_on_alike(tmp_path: Path) -> None:
    adapter, chosen = without(adapter_of(model_of("internvl"))), options_of(model_of("internvl"))
    engine, towers = make(chosen, adapter)
    update(engine, chosen, case_of(adapter), towers)
    save_checkpoint(engine, tmp_path / "checkpoint")
    second = update(engine, chosen, case_of(adapter), towers)
    resumed, empty = make(chosen, adapter)
    load_checkpoint(resumed, tmp_path / "checkpoint")
    assert strip(update(resumed, chosen, case_of(adapter), empty)) == strip(second)


# --- ranks ------------------------------------------------------------------------------------------------------------
