"""Cached features of frozen towers on several ranks: updates are those of one rank whose towers run in every pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from learner.config import Behavior, PpoClip
from learner.engines import deepspeed_engine
from learner.engines.protocol import TrainEngine
from learner.engines.torch_engine import TorchEngine
from learner.features.frozen_towers import make_towers
from learner.group import LearnerGroup
from learner.types import LearnerOptions
from tests.contracts.train_engine_contract import assert_gradients_close
from tests.helpers.learner_cases import adapter_of, changed, mixed_case, options, updater
from tests.helpers.ranks import run_ranks
from tests.model.learner.test_cached_features import case_of, options_of, update, without
from tests.system.learner.test_learner_group import store
from tests.unit.learner.test_features import MemoryStore
from vlm.families.qwen_vl import QwenVLAdapter
from vlm.tiny import build_tiny


class FrozenQwenVL(QwenVLAdapter):
    def is_used(self, name: str) -> bool:
        return self.role(name) == "language"


PARTS = ([0, 2, 3], [1])


def three_updates(engine: TrainEngine, chosen: LearnerOptions, members: Sequence[int]) -> list[Any]:
    """Images that are all new; the same again, none of them new; new ones, all on the rank that so far had none."""
    adapter: Any = engine.adapter  # type: ignore[attr-defined]
    towers = make_towers(engine, adapter, chosen, MemoryStore)
    assert towers is not None
    turned = [i for i in range(4) if i not in members] if chosen.learner.ranks > 1 else members
    results: list[Any] = []
    for seed, own in ((0, members), (0, members), (40, turned)):
        case = case_of(adapter, seed).part(own)
        results.append(update(engine, chosen, case, towers))
    scored = updater(engine, chosen, towers).score(case.groups, case.media)
    (total,) = engine.all_reduce_sum([float(sum(x.sum() for group in scored for x in group))])
    return [*results, total]


def two_ranks(rank: int, models: Path, out: Path) -> None:
    """Under ZeRO-3 with every parameter partitioned: none is so small that each rank keeps it, none is left out of what
    the ranks gather together."""
    config = deepspeed_engine.engine_config

    def partitioned(chosen: LearnerOptions) -> dict[str, Any]:
        made = config(chosen)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    deepspeed_engine.engine_config = partitioned
    for model in sorted(models.iterdir()):
        adapter = without(adapter_of(model))
        for stage in (2, 3):
            chosen = options_of(model, ranks=2, zero_stage=stage, learning_rate=1e-4)
            engine = deepspeed_engine.DeepSpeedEngine(chosen, adapter)
            results = three_updates(engine, chosen, PARTS[rank])
            state = {f"{stage}/{name}": value.detach().clone() for name, value in engine.state_tensors()}
            if rank == 0:
                (out / f"{model.name}-{stage}.json").write_text(json.dumps(results))
                save_file(state, out / f"{model.name}-{stage}.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    (folder / "out").mkdir()
    for family in ("qwen2_5_omni", "internvl"):
        build_tiny(family, folder / "models" / family)
    run_ranks(two_ranks, 2, folder / "models", folder / "out")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_omni", "internvl"])
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_with_and_without_new_images_train_as_one_rank_does(results: Path, family: str, stage: int) -> None:
    adapter = without(adapter_of(results / "models" / family))
    chosen = options_of(results / "models" / family, learning_rate=1e-4)
    engine = TorchEngine(chosen, adapter)
    expected = three_updates(engine, chosen, range(4))
    ours = json.loads((results / "out" / f"{family}-{stage}.json").read_text())
    for mine, exact in zip(ours[:3], expected[:3], strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(exact[name], rel=2e-4, abs=1e-5), name
        for name in ("tokens_trained", "completions_trained"):
            assert mine["metrics"][name] == exact["metrics"][name]
    assert ours[3] == pytest.approx(expected[3], rel=1e-3)
    computed = [stats["metrics"]["features_computed"] for stats in expected[:3]]
    assert [stats["metrics"]["features_computed"] for stats in ours[:3]] == computed and computed[1] == 0 < computed[2]
    state = load_file(results / "out" / f"{family}-{stage}.safetensors")
    moments = {name: value for name, value in engine.state_tensors() if name.startswith("exp_avg/")}
    assert_gradients_close({name: state[f"{stage}/{name}"] for name in moments}, moments)


@pytest.mark.slow
def test_ranks_find_in_the_object_store_what_others_computed(local_ray: ModuleType, tiny_model: Path) -> None:
    """Groups are dealt to the ranks in another way for the KL than to be trained; memory holds one image."""
    adapter = f"{FrozenQwenVL.__module__}:{FrozenQwenVL.__name__}"
    case = mixed_case(adapter_of(tiny_model))
    wide = {"off_policy": Behavior(), "loss": PpoClip(high=100.0), "max_staleness": 1}
    chosen = options(tiny_model, adapter=adapter, feature_cache_gib=2e-6, **wide)
    group = LearnerGroup(changed(chosen, ranks=2, zero_stage=3), [{"num_cpus": 0}] * 2)
    group.start(timeout=300.0)
    try:
        refs, summaries = store(local_ray, case.groups)
        generated = [stored.group for stored in refs]
        dealt = zip(group.ranks, (generated[:2], generated[2:]), strict=True)
        local_ray.get([rank.reference_kl.remote(own) for rank, own in dealt])
        stats = [group.update(refs, summaries, version) for version in (0, 1)]
    finally:
        group.shutdown()
    engine = TorchEngine(chosen, without(adapter_of(tiny_model)))
    exact = [update(engine, chosen, case, None) for _ in range(2)]
    for ours, expected in zip(stats, exact, strict=True):
        assert ours.loss == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
        assert ours.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert [s.metrics["features_computed"] for s in stats] == [4, 0]  # for the KL
    assert [s.metrics["features_reused"] for s in stats] == [4, 4]
