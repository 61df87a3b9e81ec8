"""Prepare a process before vLLM is imported: set environment variables, and check the device."""

from __future__ import annotations

import os

import torch

from rollout.engines.protocol import EngineOptions
from vlm.import_path import ours_first


def set_environment(options: EngineOptions) -> None:
    """Set the environment variables that vLLM and its child processes read, and give them this process's import
    path."""
    ours_first()
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(options.start_timeout))
    # Its warnings repeat at every start and sync, and this project checks their causes itself.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.device == "cpu":
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the requested size
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several engines and learners share the cores
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process fewer: the worker runs in the engine core
        # Threads that spin while they wait take the cores from learners and other engines: seven times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # only a helper of the sampler would be compiled, for half a minute


def check_device(options: EngineOptions) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "the rollout engine was asked for device 'cuda', but torch sees no CUDA GPU here. Run it on a node with "
            "GPUs, or set cluster.device=cpu (and install the extra 'cpu')"
        )
