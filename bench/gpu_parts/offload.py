"""Optimizer states in CPU memory: measure a step by the number of threads, and compare it with the step of a GPU.

On GPUs DeepSpeed's own AdamW for CPUs is used, which compiles itself with g++ at first use. The number of threads is
set before a process starts, so each number has its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu_parts.common import Setting, join_alone
from bench.gpu_parts.exact import work_of
from learner.config import AlgorithmConfig, Cispo, Current, LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import TinySizes, build_tiny

SIZES = TinySizes(hidden=1024, intermediate=4096, layers=16, heads=16, kv_heads=4)
STEPS = 3


def run(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        path = build_tiny("qwen2_5_vl", Path(folder) / "model", sizes=TinySizes() if setting.small else SIZES)
        for threads in sorted({1, min(16, os.cpu_count() or 1)}):
            for offloaded in (False, True):
                name = f"{'offloaded' if offloaded else 'on the device'}, {threads} threads"
                found[name] = _apart(setting, path, threads, offloaded)
    norms = [one["grad_norm"] for one in found.values()]
    return {**found, "checks": {"the same gradient norm": max(norms) - min(norms) <= 1e-2 * max(norms)}}


def _apart(setting: Setting, path: Path, threads: int, offloaded: bool) -> dict[str, float]:
    arguments = [str(path), setting.device, "1" if offloaded else "0"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_parts.offload", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the step with {threads} threads failed: {done.stderr[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _steps(path: str, device: Any, offloaded: bool) -> dict[str, float]:
    setting = Setting(device, small=False)
    options = LearnerOptions(
        ModelConfig(path, dtype="bfloat16"),
        100,
        device=device,
        algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
        learner=LearnerConfig(learning_rate=1e-6, offload="optimizer" if offloaded else "none"),
    )
    join_alone(options)
    adapter = load_adapter(path)
    batches, counts = work_of(adapter, image=True)
    engine, loss = DeepSpeedEngine(options, adapter), micro_loss(options, counts)
    start = time.perf_counter()
    norm = engine.train_step(batches, loss).grad_norm
    first = time.perf_counter() - start
    seconds = setting.seconds(lambda: engine.train_step(batches, loss), STEPS)
    parameters = sum(p.numel() for p in engine.policy.parameters())
    return {"parameters": parameters, "grad_norm": norm, "first_seconds": first, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(_steps(sys.argv[1], sys.argv[2], sys.argv[3] == "1")))
