"""Measure the vision tower of Qwen2.5-VL at its real size: milliseconds per image, alone and in batches of 16, trained
and frozen.

The tower runs as the learner loads it, and as transformers loads it, whose `sdpa` makes one call per window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts.common import Setting, error_of, shapes
from bench.memory_process import Case, make_batches
from learner.config import LearnerConfig
from learner.model.load import load_policy
from learner.model.policy import PolicyModule
from learner.types import LearnerOptions
from vlm.batch import MultimodalBatch
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

EDGE = {False: 896, True: 112}
"""Edge of the image in pixels, at full size and small: 1,024 or 16 tokens."""


def run(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    outputs = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        path = shapes(setting)["3B"].build(Path(folder) / "model", setting.device)
        adapter = load_adapter(str(path))
        dtype: Any = "bfloat16" if setting.cuda else "float32"
        learner = LearnerConfig(gradient_checkpointing=())
        options = LearnerOptions(ModelConfig(str(path), dtype), 1, device=setting.device, learner=learner)
        policy = load_policy(options, adapter).to(setting.device)
        edge, many = EDGE[setting.small], 2 if setting.small else 16
        case = Case("image", rows=1, prompt=(edge // 28) ** 2 + 64, completion=4, image=edge, micro_batches=1)
        one = make_batches(case, adapter)[0].to(setting.device, setting.dtype)
        several = _repeated(one, many)
        for name, implementation in (("ours", None), ("sdpa", "sdpa")):
            if implementation is not None:
                policy.base.set_attn_implementation({"vision_config": implementation})
            outputs[name] = _features(policy, one)
            found[name] = {
                f"{images} images, {kind}": setting.seconds(partial(_run, policy, batch, kind == "trained"), 3)
                for images, batch in ((1, one), (many, several))
                for kind in ("frozen", "trained")
            }
    error = error_of(outputs["ours"], outputs["sdpa"])
    limit = 0.02 if setting.cuda else 1e-5
    return {**found, "difference": error, "checks": {"the features of sdpa": error <= limit}}


def _repeated(batch: MultimodalBatch, times: int) -> MultimodalBatch:
    """Return the batch with its image repeated. Only towers read it."""
    assert batch.pixel_values is not None
    grid = batch.extra_model_kwargs["image_grid_thw"]
    given = {**batch.extra_model_kwargs, "image_grid_thw": grid.repeat(times, 1)}
    return MultimodalBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        loss_mask=batch.loss_mask,
        pixel_values=batch.pixel_values.repeat(times, 1),
        extra_model_kwargs=given,
    )


def _features(policy: PolicyModule, batch: MultimodalBatch) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([row[0] for row in policy(batch, towers_only=True)["image"]])


def _run(policy: PolicyModule, batch: MultimodalBatch, trained: bool) -> None:
    forward: Callable[[], Any] = partial(policy, batch, towers_only=True)
    if not trained:
        with torch.no_grad():
            forward()
        return
    rows = forward()["image"]
    torch.stack([row[0].float().square().sum() for row in rows]).sum().backward()
    policy.zero_grad()
