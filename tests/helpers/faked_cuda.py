"""The configuration that vLLM would choose on an H100: `python -m tests.helpers.faked_cuda MODEL...` prints it as JSON.

vLLM's own CUDA platform answers, with its kernels stubbed; nothing is computed. To be run in a process of its own:
vLLM decides on its platform once.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import torch


class Stub(ModuleType):
    """A module whose every name is a function that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def fake() -> None:
    """Let vLLM believe that it is built for CUDA and sees eight H100s."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn"):
        sys.modules[f"vllm.{name}"] = Stub(f"vllm.{name}")
    namespace: Any = type(torch.ops._C)
    found = namespace.__getattr__

    def operator(self: Any, name: str) -> Any:
        """Kernels are asked what they support while modules are imported."""
        try:
            return found(self, name)
        except AttributeError:
            if "support" not in name:
                raise
            return lambda *args: True

    namespace.__getattr__ = operator
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H100(NonNvmlCudaPlatform):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 * 2**30)
        is_fully_connected = classmethod(lambda cls, ids: True)
        device_count = classmethod(lambda cls: 8)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
        import_kernels = classmethod(lambda cls: None)

    vllm.platforms._current_platform = H100()  # type: ignore[assignment]
    import vllm.config.vllm

    vllm.config.vllm.HAS_TRITON = True


def configured(model: str) -> dict[str, Any]:
    from rollout.config import RolloutConfig
    from rollout.engines.protocol import EngineOptions
    from rollout.engines.vllm_config import engine_config
    from vlm.config import ModelConfig
    from vlm.families.registry import load_adapter

    options = EngineOptions(
        ModelConfig(model),
        RolloutConfig(engine_options={"tensor_parallel_size": 2, "max_num_seqs": 64, "gpu_memory_utilization": 0.4}),
        device="cuda",
        max_model_len=3072,
        weight_transfer_backend="nccl",
    )
    config = engine_config(options, load_adapter(model))
    return {
        "device": config.device_config.device_type,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "second_runner": config.use_v2_model_runner,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "logprobs_mode": config.model_config.logprobs_mode,
        "images_see_themselves": config.model_config.is_mm_prefix_lm,
        "backend": config.weight_transfer_config.backend,
        "extension": config.parallel_config.worker_extension_cls,
        "executor": config.parallel_config.distributed_executor_backend,
    }


if __name__ == "__main__":
    fake()
    sys.stdout.write(json.dumps([configured(model) for model in sys.argv[1:]]))
