"""Check that training continues bit for bit when another CUDA stream becomes the current one, as vLLM does on rank
0."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench.gpu_parts.common import Setting, join_alone
from bench.gpu_parts.exact import work_of
from learner.config import AlgorithmConfig, Cispo, Current, LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import build_tiny

STEPS = 4


def run(setting: Setting) -> dict[str, Any]:
    checks = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        path = build_tiny("qwen2_5_vl", Path(folder) / "model")
        adapter = load_adapter(str(path))
        dtype: Any = "bfloat16" if setting.cuda else "float32"
        options = LearnerOptions(
            ModelConfig(str(path), dtype),
            100,
            device=setting.device,
            algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
        )
        join_alone(options)
        batches, counts = work_of(adapter, image=True)
        stages: tuple[Literal[2, 3], ...] = (2, 3)
        for stage in stages:
            own = replace(options, learner=LearnerConfig(zero_stage=stage, learning_rate=1e-3))
            states = []
            for switched in (False, True):
                engine = DeepSpeedEngine(own, adapter)
                for step in range(STEPS):
                    if step == STEPS // 2 and switched and setting.cuda:
                        torch.cuda.set_stream(torch.cuda.Stream())
                    engine.train_step(batches, micro_loss(own, counts))
                states.append({name: tensor.detach().cpu() for name, tensor in engine.state_tensors()})
            same = all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
            checks[f"ZeRO-{stage}: the same states to the bit"] = same
    return {"steps": STEPS, "checks": checks}
