"""Every option of an engine reaches vLLM, by names it has; an engine that fails under NCCL is named."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rollout.config import RolloutConfig
from rollout.engines.protocol import EngineOptions
from rollout.engines.vllm_config import engine_arguments
from rollout.engines.vllm_process import set_environment
from tests.unit.rollout.test_vllm_arguments import ADAPTER
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import build_tiny
from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource
from weight_sync.verify import WeightSyncError

OTHER: dict[str, Any] = {
    "max_model_len": 1234,
    "device": "cpu",
    "threads": 3,
    "max_media_per_prompt": {"image": 2},
    "weight_transfer_backend": "nccl",
    "seed": 5,
    "start_timeout": 77.0,
}
MODEL: dict[str, Any] = {"path": "other", "dtype": "float32", "trust_remote_code": True}
ROLLOUT: dict[str, Any] = {
    "kv_cache_gib": 0.5,
    "engine_options": {"max_num_batched_tokens": 999},
}
BASE = EngineOptions(ModelConfig("model"), device="cuda")
CHANGED = {
    **{name: replace(BASE, **{name: value}) for name, value in OTHER.items()},
    **{f"model.{name}": replace(BASE, model=replace(BASE.model, **{name: value})) for name, value in MODEL.items()},
    **{f"rollout.{name}": replace(BASE, rollout=RolloutConfig(**{name: value})) for name, value in ROLLOUT.items()},
}
HERE = {"control_timeout"}
"""What VLLMEngine itself goes by, with every control call; tests/unit/rollout/test_vllm_engine.py holds it."""


def reaches(options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, str]]:
    """All that vLLM is told: arguments, and variables of its environment."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {})
        set_environment(options)
        return engine_arguments(options, ADAPTER), dict(os.environ)


def test_every_option_of_an_engine_has_another_value_here() -> None:
    assert {f.name for f in fields(EngineOptions)} == {"model", "rollout", *OTHER, *HERE}
    by_learner_and_processor = {"adapter", "lora", "max_image_tokens", "freeze"}
    assert {f.name for f in fields(ModelConfig)} == {*MODEL, *by_learner_and_processor}
    by_request_and_driver = {"engines", "num_generations", "max_completion_length", "temperature", "max_staleness"}
    by_request_and_driver |= {"admission"}
    assert {f.name for f in fields(RolloutConfig)} == {*ROLLOUT, *by_request_and_driver}


@pytest.mark.parametrize("name", CHANGED)
def test_no_option_of_an_engine_is_dead_on_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reaches(BASE, monkeypatch) != reaches(CHANGED[name], monkeypatch)


def test_names_of_arguments_are_those_of_the_pinned_vllm() -> None:
    from vllm import AsyncEngineArgs
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
    from vllm.v1.engine.async_llm import AsyncLLM

    known = {f.name for f in fields(AsyncEngineArgs)}
    for device in ("cuda", "cpu"):
        rollout = RolloutConfig(kv_cache_gib=1, engine_options={"tensor_parallel_size": 2})
        options = EngineOptions(ModelConfig("m"), rollout, device=device, weight_transfer_backend="nccl")
        assert engine_arguments(options, ADAPTER).keys() <= known
    assert {"usage_context"} <= inspect.signature(AsyncEngineArgs.create_engine_config).parameters.keys()
    assert {"mode", "clear_cache"} <= inspect.signature(AsyncLLM.pause_generation).parameters.keys()
    assert {"reset_running_requests"} <= inspect.signature(AsyncLLM.reset_prefix_cache).parameters.keys()
    info = {"master_address", "master_port", "world_size", "packed_buffer_size_bytes", "rank"}
    assert info <= {f.name for f in fields(NCCLTrainerInitInfo)}
    assert "model_update_group" in inspect.getsource(NCCLTrainerWeightTransferEngine.send_weights) + inspect.getsource(
        NCCLTrainerWeightTransferEngine._broadcast
    )
    assert list(inspect.signature(PyNcclCommunicator.destroy).parameters) == ["self"]


def test_what_vllm_makes_of_the_options_on_a_gpu(tiny_model: Path, tmp_path: Path) -> None:
    """Gemma3 alone lets image tokens see each other there, which is why it is not trained on GPUs."""
    command = [
        sys.executable,
        "-m",
        "tests.helpers.faked_cuda",
        str(tiny_model),
        str(build_tiny("gemma3", tmp_path / "gemma")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    qwen, gemma = json.loads(done.stdout.splitlines()[-1])
    assert qwen == {
        "device": "cuda",
        "gpu_memory_utilization": 0.4,
        "prefix_caching": True,
        "second_runner": True,
        "async_scheduling": True,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 64,
        "logprobs_mode": "processed_logprobs",
        "images_see_themselves": False,
        "backend": "nccl",
        "extension": "weight_sync.vllm_worker.PolicyWorker",
        "executor": "mp",
    }
    assert gemma["images_see_themselves"] and "cuda" in load_adapter(str(tmp_path / "gemma")).untrainable_on


class Blocked:
    """A communicator whose broadcast waits until it is destroyed, as NCCL's does for a peer that is gone."""

    def __init__(self) -> None:
        self.destroyed, self.entered = threading.Event(), threading.Event()

    def broadcast(self, *args: Any, **kwargs: Any) -> None:
        self.entered.set()
        assert self.destroyed.wait(60.0), "nobody ended the broadcast"

    def destroy(self) -> None:
        self.destroyed.set()


def test_an_engine_that_fails_while_nccl_waits_ends_the_broadcast_with_its_own_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    communicator = Blocked()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: communicator)
    monkeypatch.setattr(
        nccl_engine,
        "packed_nccl_broadcast_producer",
        lambda iterator, group, **_: [group.broadcast(tensor) for _, tensor in iterator],
    )

    def done(value: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(value)
        return future

    def receive(info: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def fail() -> None:
            communicator.entered.wait(60.0)
            future.set_exception(torch.OutOfMemoryError("CUDA out of memory"))

        threading.Thread(target=fail, daemon=True).start()
        return future

    engine: Any = SimpleNamespace(
        name="rollout-0",
        workers=1,
        init_weight_transfer=lambda info: done(),
        check_health=done,
        receive_weights=receive,
    )
    sender = WeightSender(PolicySource(nn.Linear(2, 2)), backend="nccl", rank=0, timeout=300.0)
    sender.form_group([engine])
    with pytest.raises(WeightSyncError, match=r"rollout-0.*CUDA out of memory") as caught:
        sender.send()
    assert caught.value.engines == ("rollout-0",) and communicator.destroyed.is_set()
