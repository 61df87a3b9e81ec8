"""The same update on one to four ranks: loss, gradients, statistics, checkpoints. Gloo, ZeRO-2 and ZeRO-3.

Two processes are started; in the slow tests three more, then four. Each runs the scenarios it is given one after
another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from learner.config import Geometric, Gspo, Kl, LinearDecay
from learner.engines.checkpoint import load_checkpoint, save_checkpoint
from learner.engines.torch_engine import TorchEngine
from tests.contracts.train_engine_contract import assert_gradients_close, gradients_of
from tests.helpers.learner_cases import (
    Case,
    adapter_of,
    expected_update,
    make_case,
    make_group,
    mixed_case,
    options,
    update,
    updater,
)
from tests.helpers.ranks import run_ranks
from vlm.adapter import MultimodalAdapter
from vlm.config import Lora

# Groups 0, 2 and 3 of the mixed case have images, 1 has none: a rank of its own sees text alone, with fewer tokens
# and fewer micro-batches than the others.
TWO = ([0, 2, 3], [1])
THREE = ([0, 3], [1], [2])
TEN = {"micro_batch": 90, "lr_schedule": LinearDecay()}


# Everything that depends on more than one token: ratios of sequences, their rejection, their weights; two steps against
# the policy before the first; a KL to a reference that is refreshed between the updates.
ELABORATE = {
    "loss": Gspo(),
    "aggregation": "sequence",
    "off_policy": Geometric(min=0.02, max=50.0),
    "kl": Kl(0.1, estimator="k2", refresh=1),
    "optimizer_steps": 2,
    "entropy_bonus": 0.01,
    "micro_batch": 90,
}


def elaborate_updates(engine: Any, chosen: Any, members: Sequence[int]) -> list[dict[str, Any]]:
    """Two updates of two steps each on this rank's groups, the reference refreshed between them; then the KL of what
    was sampled to that reference."""
    case = mixed_case(engine.adapter).part(members)
    minibatches = [i % 2 for i in members]
    first = update(engine, chosen, case, minibatches=minibatches)
    engine.refresh_reference()
    second = update(engine, chosen, case, minibatches=minibatches)
    divergence = updater(engine, chosen).reference_kl(case.groups, case.media)
    (total,) = engine.all_reduce_sum([sum(map(sum, divergence))])
    return [first, second, {"divergence": total}]


def two_ranks(rank: int, model: Path, out: Path) -> None:
    """ZeRO-2 and ZeRO-3: a first update, its gradients, a checkpoint, a second update, the model saved."""
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    case = mixed_case(adapter_of(model)).part(TWO[rank])
    for stage in (2, 3):
        chosen = options(model, ranks=2, zero_stage=stage, **TEN)
        engine = DeepSpeedEngine(chosen, adapter_of(model))
        first = update(engine, chosen, case)
        gradients = gradients_of(engine, chosen)
        save_checkpoint(engine, out / f"checkpoint-{stage}")
        second = update(engine, chosen, case)
        engine.save_pretrained(out / f"model-{stage}")
        scored = updater(engine, chosen).score(case.groups, case.media)
        chosen = options(model, ranks=2, zero_stage=stage, **ELABORATE)
        elaborate = elaborate_updates(DeepSpeedEngine(chosen, adapter_of(model)), chosen, TWO[rank])
        if rank == 0:
            (out / f"stats-elaborate-{stage}.json").write_text(json.dumps(elaborate))
            save_file(gradients, out / f"gradients-{stage}.safetensors")
            scores = [[values.tolist() for values in group] for group in scored]
            (out / f"stats-{stage}.json").write_text(json.dumps([first, second, scores]))


def three_ranks(rank: int, model: Path, out: Path) -> None:
    """A checkpoint of two ranks under ZeRO-2 goes on under ZeRO-3 on three; a fresh first update; LoRA."""
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    case = mixed_case(adapter_of(model)).part(THREE[rank])
    chosen = options(model, ranks=3, zero_stage=3, **TEN)
    engine = DeepSpeedEngine(chosen, adapter_of(model))
    first = update(engine, chosen, case)
    gradients = gradients_of(engine, chosen)
    load_checkpoint(engine, out / "checkpoint-2")
    second = update(engine, chosen, case)
    lora = options(model, ranks=3, zero_stage=3, lora=Lora(2), **TEN)
    engine = DeepSpeedEngine(lora, adapter_of(model))
    lora_stats = [update(engine, lora, case) for _ in range(2)]
    chosen = options(model, ranks=3, zero_stage=3, **ELABORATE)
    elaborate = elaborate_updates(DeepSpeedEngine(chosen, adapter_of(model)), chosen, THREE[rank])
    if rank == 0:
        (out / "stats-elaborate-three.json").write_text(json.dumps(elaborate))
        save_file(gradients, out / "gradients-three.safetensors")
        (out / "stats-three.json").write_text(json.dumps([first, second, *lora_stats]))


FOUR = ([0, 4, 5], [1], [2, 3], [])
"""Images in two micro-batches, text in one, videos and images, nothing at all."""
MEDIA = {"media_kinds": ("image", "video"), "micro_batch": 110}


def media_case(adapter: MultimodalAdapter) -> Case:
    kinds = [["image"], [], ["video"], ["video", "image"], ["image", "image"], ["image"]]
    return make_case([make_group(adapter, i, media=own, scores=[0.0, 1.0, 0.5]) for i, own in enumerate(kinds)])


def four_ranks(rank: int, model: Path, out: Path) -> None:
    """Every rank with another mix, two updates, with and without recomputation."""
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    case = media_case(adapter_of(model)).part(FOUR[rank])
    for roles in ((), ("language", "vision")):
        chosen = options(model, ranks=4, zero_stage=3, gradient_checkpointing=roles, **MEDIA)
        engine = DeepSpeedEngine(chosen, adapter_of(model))
        first = update(engine, chosen, case)
        gradients = gradients_of(engine, chosen)
        second = update(engine, chosen, case)
        if rank == 0:
            save_file(gradients, out / f"gradients-four-{len(roles)}.safetensors")
            (out / f"stats-four-{len(roles)}.json").write_text(json.dumps([first, second]))


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(two_ranks, 2, tiny_model, out)
    return out


@pytest.fixture(scope="module")
def more_results(results: Path, tiny_model: Path) -> Path:
    run_ranks(three_ranks, 3, tiny_model, results)
    run_ranks(four_ranks, 4, tiny_model, results)
    return results


@pytest.fixture
def run(name: str, request: pytest.FixtureRequest) -> Path:
    """Where the results called `name` are."""
    folder: Path = request.getfixturevalue("more_results" if name == "three" else "results")
    return folder


RUNS = ["2", "3", pytest.param("three", marks=pytest.mark.slow)]


def stats_of(results: Path, name: str) -> Sequence[Any]:
    return json.loads((results / f"stats-{name}.json").read_text())


def assert_same_update(ours: Mapping[str, Any], one_rank: Mapping[str, Any]) -> None:
    for name in ("loss", "grad_norm", "learning_rate", "staleness_max"):
        assert ours[name] == pytest.approx(one_rank[name], rel=2e-4, abs=1e-5), name
    assert set(ours["metrics"]) == set(one_rank["metrics"])
    for name, value in one_rank["metrics"].items():
        if name not in ("micro_batches", "positions_computed"):  # these depend on how groups are dealt out
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.fixture(scope="module")
def one_rank(tiny_model: Path) -> tuple[TorchEngine, list[dict[str, Any]]]:
    """Two updates by the reference engine, on all groups."""
    chosen = options(tiny_model, **TEN)
    engine = TorchEngine(chosen, adapter_of(tiny_model))
    case = mixed_case(adapter_of(tiny_model))
    return engine, [update(engine, chosen, case) for _ in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradients_do_not_depend_on_ranks(
    run: Path, tiny_model: Path, one_rank: tuple[TorchEngine, list[dict[str, Any]]], name: str
):
    first, second = stats_of(run, name)[:2]
    assert_same_update(first, one_rank[1][0])
    assert_same_update(second, one_rank[1][1])
    expected = expected_update(tiny_model, mixed_case(adapter_of(tiny_model)), options(tiny_model))
    assert first["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert_gradients_close(load_file(run / f"gradients-{name}.safetensors"), expected.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [0, 2])
def test_four_ranks_with_text_images_videos_and_nothing_are_as_one(
    more_results: Path, tiny_model: Path, recomputed: int
) -> None:
    chosen = options(tiny_model, **MEDIA)
    adapter = adapter_of(tiny_model)
    case = media_case(adapter)
    engine = TorchEngine(chosen, adapter)
    expected = expected_update(tiny_model, case, chosen)
    first, second = stats_of(more_results, f"four-{recomputed}")
    assert first["metrics"]["micro_batches"] > 1  # of which a rank without groups has none, and others fewer
    assert_same_update(first, update(engine, chosen, case))
    assert_same_update(second, update(engine, chosen, case))
    assert_gradients_close(load_file(more_results / f"gradients-four-{recomputed}.safetensors"), expected.gradients)


@pytest.fixture(scope="module")
def elaborate(tiny_model: Path) -> list[dict[str, Any]]:
    chosen = options(tiny_model, **ELABORATE)
    return elaborate_updates(TorchEngine(chosen, adapter_of(tiny_model)), chosen, range(4))


@pytest.mark.parametrize("name", RUNS)
def test_nothing_of_an_elaborate_objective_depends_on_ranks(
    run: Path, elaborate: list[dict[str, Any]], name: str
) -> None:
    first, second, divergence = stats_of(run, f"elaborate-{name}")
    assert_same_update(first, elaborate[0])
    assert_same_update(second, elaborate[1])
    assert divergence["divergence"] == pytest.approx(elaborate[2]["divergence"], rel=1e-3)
    assert 0 < elaborate[0]["metrics"]["correction"] < 1  # some completions were rejected, not all
    assert elaborate[1]["metrics"]["kl"] < elaborate[0]["metrics"]["kl"] + 1  # the reference moved along
    assert elaborate[0]["metrics"]["ratio_max"] != 1.0  # the second step is against the policy before the first


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_two_ranks_goes_on_on_one(
    results: Path, tiny_model: Path, one_rank: tuple[TorchEngine, list[dict[str, Any]]], stage: int
):
    chosen = options(tiny_model, **TEN)
    engine = TorchEngine(chosen, adapter_of(tiny_model))
    load_checkpoint(engine, results / f"checkpoint-{stage}")
    assert engine.steps == 1
    assert_same_update(update(engine, chosen, mixed_case(adapter_of(tiny_model))), one_rank[1][1])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_model_saved_by_two_ranks_is_the_policy(results: Path, tiny_model: Path, stage: int):
    scores = stats_of(results, str(stage))[2]
    saved = options(results / f"model-{stage}")
    engine = TorchEngine(saved, adapter_of(tiny_model))
    case = mixed_case(adapter_of(tiny_model)).part(TWO[0])
    again = updater(engine, saved).score(case.groups, case.media)
    for ours, theirs in zip(again, scores, strict=True):
        for values, expected in zip(ours, theirs, strict=True):
            assert values.tolist() == pytest.approx(expected, abs=3e-5)
    assert AutoModelForImageTextToText.from_pretrained(results / f"model-{stage}").config.tie_word_embeddings


@pytest.mark.slow
def test_lora_on_three_ranks_is_lora_on_one(more_results: Path, tiny_model: Path):
    chosen = options(tiny_model, lora=Lora(2), **TEN)
    engine = TorchEngine(chosen, adapter_of(tiny_model))
    for ours in stats_of(more_results, "three")[2:]:
        assert_same_update(ours, update(engine, chosen, mixed_case(adapter_of(tiny_model))))
