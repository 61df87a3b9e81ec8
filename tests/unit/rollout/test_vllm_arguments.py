"""Every option of an engine reaches vLLM, by names it has; an engine that fails under NCCL is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineOptions
from rollout.engines.vllm_config import engine_arguments
from saccade.config.load import parse_config
from saccade.config.options import engine_options
from vlm.config import ModelConfig

ADAPTER: Any = SimpleNamespace(modalities={"image": None}, has_vision=True, engine_processor={})


def test_memory_knobs_arrive_as_they_are() -> None:
    rollout = RolloutConfig(kv_cache_gib=2, engine_options={"gpu_memory_utilization": 0.4})
    arguments = engine_arguments(EngineOptions(ModelConfig("m"), rollout, device="cuda"), ADAPTER)
    assert (arguments["gpu_memory_utilization"], arguments["kv_cache_memory_bytes"]) == (0.4, 2 * 2**30)
    assert "enforce_eager" not in arguments and "max_num_batched_tokens" not in arguments


@pytest.mark.parametrize(("device", "threads"), [("cuda", 6), ("cpu", 6)])
def test_beside_a_gpu_an_engine_prepares_images_on_all_its_cpus(device: Any, threads: int) -> None:
    config = parse_config(
        {
            "output_dir": "x",
            "steps": 1,
            "model": {"path": "m"},
            "data": {"train": ["a"]},
            "cluster": {"resources": {"rollout": {"CPU": 6}}},
        }
    )
    assert engine_options(config, device, ("image",)).threads == threads
