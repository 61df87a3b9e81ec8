"""Cached tower outputs on several ranks: a frozen tower runs once for each distinct item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from learner.engines import deepspeed_engine
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from tests.contracts.train_engine_contract import assert_gradients_close
from tests.helpers.learner_cases import adapter_of
from tests.helpers.ranks import run_ranks
from tests.model.learner.test_cached_features import options_of
from tests.model.learner.test_cached_tower_outputs import VISION
from tests.system.learner.test_cached_features import PARTS, three_updates
from vlm.tiny import build_tiny


def two_ranks(rank: int, models: Path, out: Path) -> None:
    """Under ZeRO-3 with every parameter partitioned; the second rank has text only, then new images all alone."""
    config = deepspeed_engine.engine_config

    def partitioned(chosen: LearnerOptions) -> dict[str, Any]:
        made = config(chosen)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    deepspeed_engine.engine_config = partitioned
    for model in sorted(models.iterdir()):
        chosen = options_of(model, ranks=2, zero_stage=3, learning_rate=1e-4, **VISION)
        engine = deepspeed_engine.DeepSpeedEngine(chosen, adapter_of(model))
        results = three_updates(engine, chosen, PARTS[rank])
        state = {name: value.detach().clone() for name, value in engine.state_tensors()}
        if rank == 0:
            (out / f"{model.name}.json").write_text(json.dumps(results))
            save_file(state, out / f"{model.name}.safetensors")


RANKED = ("llava_next", "qwen2_5_omni", "qwen3_vl")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower-end")
    (folder / "out").mkdir()
    for family in RANKED:
        build_tiny(family, folder / "models" / family)
    run_ranks(two_ranks, 2, folder / "models", folder / "out")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", RANKED)
def test_ranks_with_and_without_images_train_as_one_rank_does(results: Path, family: str) -> None:
    chosen = options_of(results / "models" / family, learning_rate=1e-4, **VISION)
    engine = TorchEngine(chosen, adapter_of(results / "models" / family))
    expected = three_updates(engine, chosen, range(4))
    ours = json.loads((results / "out" / f"{family}.json").read_text())
    for mine, exact in zip(ours[:3], expected[:3], strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(exact[name], rel=2e-4, abs=1e-5), name
        for name in ("tokens_trained", "completions_trained"):
            assert mine["metrics"][name] == exact["metrics"][name]
        assert mine["metrics"]["features_computed"] == exact["metrics"]["features_computed"]
    assert ours[3] == pytest.approx(expected[3], rel=1e-3)
    state = load_file(results / "out" / f"{family}.safetensors")
    moments = {name: value for name, value in engine.state_tensors() if name.startswith("exp_avg/")}
    assert_gradients_close({name: state[name] for name in moments}, moments)
