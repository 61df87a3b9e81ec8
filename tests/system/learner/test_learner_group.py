"""LearnerGroup with two real ranks on Ray: updates by reference, and failures that name themselves."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from learner.algorithm.advantages import ADVANTAGES
from learner.config import Kl
from learner.durable import StorageError
from learner.engines.torch_engine import TorchEngine
from learner.group import LearnerGroup
from learner.types import LearnerError, LearnerTimeoutError, NothingToLearnError
from rollout.types import GroupSummary, RolloutGroup, StoredGroup
from tests.helpers.learner_cases import adapter_of, changed, make_case, make_group, mixed_case, options, update, updater

PLACES = [{"num_cpus": 0}, {"num_cpus": 0}]


@pytest.fixture(scope="module")
def learner(local_ray: ModuleType, tiny_model: Path) -> Iterator[LearnerGroup]:
    group = LearnerGroup(options(tiny_model, ranks=2, zero_stage=2, micro_batch=90, max_staleness=1), PLACES)
    group.start(timeout=300.0)
    yield group
    group.shutdown()


def store(ray: ModuleType, groups: list[RolloutGroup]) -> tuple[list[StoredGroup], list[GroupSummary]]:
    """As engines and rewards store them: media and verdicts apart, carried by reference."""
    stored = []
    for group in groups:
        media = tuple(replace(m, data=ray.put(m.data)) for m in group.prompt.media)
        generated = replace(group, prompt=replace(group.prompt, media=media), verdicts=None)
        stored.append(StoredGroup(ray.put(generated), ray.put(group.verdicts)))
    return stored, [GroupSummary.of(group) for group in groups]


def test_an_update_by_reference_is_the_update_of_the_reference_engine(
    local_ray: ModuleType, tiny_model: Path, learner: LearnerGroup
):
    chosen = options(tiny_model, max_staleness=1)
    case = mixed_case(adapter_of(tiny_model))
    engine = TorchEngine(chosen, adapter_of(tiny_model))
    useless = make_group(adapter_of(tiny_model), 9, scores=[1.0, None, None, None])
    refs, summaries = store(local_ray, [useless, *case.groups])
    order = [3, 0, 4, 1, 2]  # as they happened to finish
    for version in (0, 1):
        stats = learner.update([refs[i] for i in order], [summaries[i] for i in order], version)
        expected = update(engine, chosen, case, version=version)
        assert (stats.staleness_max, stats.groups_dropped, stats.groups_flat) == (version, 1, 1)
        for name in ("completions_trained", "tokens_trained", "staleness_mean"):
            assert stats.metrics[name] == expected["metrics"][name]
        assert stats.loss == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
        assert stats.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert stats.metrics["kl"] == pytest.approx(expected["metrics"]["kl"], rel=1e-3, abs=1e-6)
        assert stats.seconds["total"] > 0 and set(stats.seconds) == {"fetch", "encode", "reference", "train", "total"}


def test_a_batch_without_a_baseline_is_refused_before_any_work(
    local_ray: ModuleType, tiny_model: Path, learner: LearnerGroup
):
    group = make_group(adapter_of(tiny_model), 0, scores=[1.0, None, None])
    refs, summaries = store(local_ray, [group])
    with pytest.raises(NothingToLearnError, match=r"none of the 1 groups at version 2.*timeout: slow"):
        learner.update(refs, summaries, 2)


@pytest.mark.slow
def test_a_batch_of_which_every_rank_finds_nothing_to_train_leaves_the_learner_usable(
    local_ray: ModuleType, tiny_model: Path, tmp_path: Path
):
    chosen = options(
        tiny_model, ranks=2, zero_stage=2, overlong="mask", advantage="dr_grpo", optimizer_steps=2, max_staleness=1
    )
    case = make_case([make_group(adapter_of(tiny_model), seed, scores=[0.0, 1.0]) for seed in range(2)])
    cut = [
        replace(g, completions=tuple(replace(c, finish_reason="length") for c in g.completions)) for g in case.groups
    ]
    group = LearnerGroup(chosen, PLACES)
    group.start(timeout=300.0)
    try:
        with pytest.raises(NothingToLearnError, match="cut off"):
            group.update(*store(local_ray, cut), 0)
        # Of two steps the second, on group 1, has scores that are finite and gradients that are not.
        huge = make_group(adapter_of(tiny_model), 1, scores=[0.0, 3e38])
        stats = group.update(*store(local_ray, [case.groups[0], huge]), 0)
        assert np.isfinite(stats.loss) and stats.metrics["completions_trained"] == 2
        assert [(r.position, r.prompts) for r in stats.refused] == [(1, (huge.prompt.ref,))]
        group.save_checkpoint(tmp_path / "finite")
        stats = group.update(*store(local_ray, case.groups), 1)
        assert stats.metrics["completions_trained"] == 4 and stats.refused == ()
    finally:
        group.shutdown()


def limit_files(worker: Any, size: int) -> None:
    """What a rank runs so that the system refuses it to write larger files, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.slow
def test_a_refused_save_of_ranks_that_gather_ends_on_all_and_changes_nothing(
    local_ray: ModuleType, tiny_model: Path, tmp_path: Path
):
    """Under ZeRO-3, where every tensor is gathered from all ranks: the others wait for nobody."""
    case = make_case([make_group(adapter_of(tiny_model), seed, scores=[0.0, 1.0]) for seed in range(4)])
    refs, summaries = store(local_ray, case.groups)
    group = LearnerGroup(options(tiny_model, ranks=2, zero_stage=3, max_staleness=1), PLACES)
    group.start(timeout=300.0)
    try:
        group.update(refs, summaries, 0)
        group.save_checkpoint(tmp_path / "c")
        group.save_pretrained(tmp_path / "m")
        undisturbed = group.update(refs, summaries, 1)
        group.save_checkpoint(tmp_path / "undisturbed")
        group.load_checkpoint(tmp_path / "c")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        (tmp_path / "file").touch()
        call = group.ranks[0].__ray_call__.remote
        local_ray.get(call(limit_files, 20_000))
        for save, name in ((group.save_checkpoint, "c"), (group.save_pretrained, "m"), (group.save_checkpoint, "new")):
            with pytest.raises(StorageError, match=rf"{name}.* cannot be written: File too large"):
                save(tmp_path / name)
        local_ray.get(call(limit_files, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match=r"file.* cannot be written"):
            group.save_checkpoint(tmp_path / "file" / "c")
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert {path.name for path in tmp_path.iterdir()} == {"c", "m", "undisturbed", "file"}
        again = group.update(refs, summaries, 1)
        assert (again.loss, again.grad_norm, again.metrics) == (
            undisturbed.loss,
            undisturbed.grad_norm,
            undisturbed.metrics,
        )
        group.save_checkpoint(tmp_path / "c")
    finally:
        group.shutdown()
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes(), path.name


def test_checkpoint_model_and_failure(local_ray: ModuleType, tiny_model: Path, learner: LearnerGroup, tmp_path: Path):
    """Last: the failure leaves the group unusable."""
    case = make_case([make_group(adapter_of(tiny_model), seed, scores=[0.0, 1.0]) for seed in range(4)])
    refs, summaries = store(local_ray, case.groups)
    learner.save_checkpoint(tmp_path / "checkpoint")
    first = learner.update(refs, summaries, 0)
    learner.load_checkpoint(tmp_path / "checkpoint")
    again = learner.update(refs, summaries, 0)
    assert (again.loss, again.grad_norm, again.metrics) == (first.loss, first.grad_norm, first.metrics)
    learner.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    broken = replace(case.groups[1], prompt_token_ids=case.groups[1].prompt_token_ids[:-1])
    refs, summaries = store(local_ray, [case.groups[0], broken])
    with pytest.raises(
        LearnerError, match=r"rank \d failed while running the update at version 1(.|\n)*EncodingMismatchError"
    ):
        learner.update(refs, summaries, 1)
    learner.shutdown()


@pytest.mark.slow
def test_a_divergence_in_the_reward_moves_the_advantages(local_ray: ModuleType, tiny_model: Path):
    """The update is that of the reference engine with advantages of scores from which beta x KL was taken."""
    chosen = options(tiny_model, kl=Kl(0.05, "k1", "reward", refresh=1), advantage="rloo")
    case = make_case([make_group(adapter_of(tiny_model), seed, scores=[0.0, 1.0, 0.5]) for seed in range(3)])
    engine = TorchEngine(chosen, adapter_of(tiny_model))
    divergence = np.array(updater(engine, chosen).reference_kl(case.groups, case.media))
    scores = np.array([[v.score for v in g.verdicts or ()] for g in case.groups])
    shaped = scores - 0.05 * divergence
    advantages = ADVANTAGES["rloo"](shaped, np.ones_like(shaped, bool)).tolist()
    expected = update(engine, chosen, replace(case, advantages=advantages))
    refs, summaries = store(local_ray, case.groups)
    group = LearnerGroup(changed(chosen, ranks=2, zero_stage=2), PLACES)
    group.start(timeout=300.0)
    try:
        stats = group.update(refs, summaries, 0)
    finally:
        group.shutdown()
    assert np.abs(divergence).max() > 1
    assert stats.loss == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
    assert stats.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert "kl" not in stats.metrics  # it is no term of the loss


def test_a_start_that_takes_too_long_or_cannot_be(local_ray: ModuleType, tiny_model: Path, tmp_path: Path):
    late = LearnerGroup(options(tiny_model), PLACES[:1])
    with pytest.raises(LearnerTimeoutError, match=r"choosing an address did not finish within 0.01 s.*rank 0"):
        late.start(timeout=0.01)
    absent = LearnerGroup(options(tmp_path / "nothing-here"), PLACES[:1])
    with pytest.raises(LearnerError, match=r"rank 0 failed while loading the model(.|\n)*nothing-here"):
        absent.start(timeout=120.0)


def test_groups_of_different_sizes_and_counts_are_refused(tiny_model: Path):
    group = LearnerGroup(options(tiny_model), PLACES[:1])
    two, three = (make_group(adapter_of(tiny_model), 0, scores=[1.0] * k) for k in (2, 3))
    summaries = [GroupSummary.of(g) for g in (two, three)]
    with pytest.raises(ValueError, match=r"different sizes in one batch: \[2, 3\]"):
        group.update([None, None], summaries, 0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 groups but 2 summaries"):
        group.update([None], summaries, 0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 ranks, but actor options for 2"):
        LearnerGroup(options(tiny_model), PLACES)
