"""Two learner ranks on one device: either NCCL refuses two ranks of one GPU, or a step of both equals that of one rank.

With gloo, which works on a CPU and can also send tensors of a GPU, the step is compared.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

from bench.gpu_parts.common import Setting
from bench.gpu_parts.exact import gradients, work_of, worst
from learner.config import AlgorithmConfig, Cispo, Current, LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.engines.process_group import join, open_store
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import build_tiny

TIMEOUT = 90.0
TOLERANCE = 1e-4


def run(setting: Setting) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        path = build_tiny("qwen2_5_vl", Path(folder) / "model")
        options = LearnerOptions(
            ModelConfig(str(path), dtype="float32"),
            100,
            device=setting.device,
            algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
            learner=LearnerConfig(ranks=2, max_grad_norm=1e9),
            timeout=60.0,
        )
        adapter = load_adapter(str(path))
        batches, counts = work_of(adapter, image=True)
        alone = replace(options, device="cpu", learner=replace(options.learner, ranks=1, zero_stage=0))
        exact = gradients(TorchEngine(alone, adapter), batches, counts, alone)
        kept = Path(folder) / "gradients.pt"
        if reason := _two(options, kept):
            refused = setting.cuda and "uplicate GPU" in reason
            return {"refused": reason[-400:], "checks": {"refused for two ranks on one GPU, or run": refused}}
        error = worst(torch.load(kept), exact)
    return {"error": error, "checks": {"gradients of one rank": error <= TOLERANCE}}


def _two(options: LearnerOptions, kept: Path) -> str:
    """Let rank 0 write the gradients to `kept`. Returns why there are none; empty if there are."""
    context = processes.get_context("spawn")
    answers = context.Queue()
    store, port = open_store("127.0.0.1", options.timeout)
    ranks = [context.Process(target=_rank, args=(options, rank, port, answers, kept), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        return answers.get(timeout=TIMEOUT)
    finally:
        for process in ranks:
            process.kill()
            process.join()
        del store


def _rank(options: LearnerOptions, rank: int, port: int, answers: Any, kept: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    try:
        join(options, rank, "127.0.0.1", port)
        adapter = load_adapter(options.model.path)
        batches, counts = work_of(adapter, image=True)
        found = gradients(DeepSpeedEngine(options, adapter), batches[rank : rank + 1], counts, options)
        if rank == 0:
            torch.save(found, kept)
            answers.put("")
        torch.distributed.barrier()
    except Exception:
        answers.put(traceback.format_exc())
