"""Measure a learner step at the widths of Qwen2.5-VL 3B and 7B, and a bare transformers loop on the same samples.

Prompts have one image of 1,024 tokens; K = 8. The language model is cut to as many layers as one GPU trains with AdamW
(`REAL`), the vision tower is whole. Both systems recompute layers in the backward pass. `mfu` is the share of the rate
of a plain matrix product in the same run; the FLOPs are those that the samples need, nothing computed twice.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts.common import RealShape, Setting, join_alone, shapes
from bench.learner_work import Shape, batches_of, make_groups, model_flops, plain_batches, rows_of
from bench.trl_step import LEARNING_RATE, BareStep
from learner.algorithm.objective import GlobalCounts
from learner.config import AlgorithmConfig, Cispo, Current, LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.plan.memory import Load
from learner.plan.predict import predict
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.batch import MultimodalBatch
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

WORK = Shape({"3B": 6, "7B": 6}, edge=896, words=40, new=512)
SMALL_WORK = Shape({"3B": 2, "7B": 2}, edge=112, words=10, new=16)
TOLERANCE = {"cuda": 0.05, "cpu": 1e-3}
"""Relative tolerance of losses and gradient norms. In bfloat16 the two systems round differently."""
MEMORY_TOLERANCE = 0.1


def run(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {"matmul_flops": setting.matmul_flops()}
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        for number, (name, shape) in enumerate(shapes(setting).items()):
            found[name] = one = _shape(setting, name, shape, Path(folder) / name, first=number == 0)
            checks |= {f"{name}: {what}": holds for what, holds in one.pop("checks").items()}
    return {**found, "checks": checks}


def learner_options(setting: Setting, path: Path, budget: int) -> LearnerOptions:
    return LearnerOptions(
        ModelConfig(str(path), dtype="bfloat16" if setting.cuda else "float32"),
        10_000,
        device=setting.device,
        algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
        learner=LearnerConfig(zero_stage=2 if setting.cuda else 0, learning_rate=LEARNING_RATE, micro_batch=budget),
    )


def _shape(setting: Setting, name: str, shape: RealShape, path: Path, *, first: bool) -> dict[str, Any]:
    work, budget = (SMALL_WORK, 2048) if setting.small else (WORK, 16_384)
    start = time.perf_counter()
    shape.build(path, setting.device)
    adapter = load_adapter(str(path))
    options = learner_options(setting, path, budget)
    if first:
        join_alone(options)
    groups, media = make_groups(adapter, work, work.groups[name], shape.vocabulary)
    together = rows_of(adapter, groups, media, share=True, budget=budget)
    single = rows_of(adapter, groups, media, share=False, budget=budget)
    shared, plain = batches_of(together, adapter, budget), plain_batches(single, adapter, budget)
    completions = len(groups) * work.K
    loss = micro_loss(options, GlobalCounts(completions * work.new, completions))
    prepared = time.perf_counter() - start

    bare = BareStep(path, setting.device, setting.dtype, checkpointing=True)
    needed = model_flops(bare.model, adapter, together, images_once=True)
    of_bare = model_flops(bare.model, adapter, single, images_once=False)
    theirs = _measure(setting, partial(bare, plain))
    del bare
    _forget(setting)
    engine = DeepSpeedEngine(options, adapter)
    engine.policy.head.banned = None  # the bare loop has no ban
    ours = _measure(setting, partial(_train, engine, shared, loss))
    del engine
    _forget(setting)
    plan = predict(options, adapter).memory(_load_of(shared))
    rate = setting.matmul_flops()
    tokens = completions * work.new
    for system, flops in ((ours, needed), (theirs, of_bare)):
        system |= {"mfu": flops / system["seconds"] / rate, "tokens_per_second": tokens / system["seconds"]}
    checks = {"loss and gradient norm are the bare loop's": _alike(ours, theirs, TOLERANCE[setting.device])}
    if setting.cuda:
        ratio = plan.peak / ours["peak_bytes"]
        ours["planned_bytes"], ours["planned_to_measured"] = plan.peak, ratio
        checks["memory as planned, within 10 %"] = abs(ratio - 1) <= MEMORY_TOLERANCE
        checks["MFU above 40 %"] = ours["mfu"] > 0.4
    return {
        "language_layers": f"{shape.sizes.layers} of {shape.layers}",
        "positions": sum(batch.num_tokens for batch in shared),
        "micro_batches": {"ours": len(shared), "bare": len(plain)},
        "prepare_seconds": prepared,
        "ours": ours,
        "bare": theirs,
        "speedup": theirs["seconds"] / ours["seconds"],
        "matmul_flops": rate,
        "checks": checks,
    }


def _train(engine: DeepSpeedEngine, batches: list[MultimodalBatch], loss: Any) -> tuple[float, float]:
    result = engine.train_step(batches, loss)
    return result.loss, result.grad_norm


def _measure(setting: Setting, step: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    """Take two unmeasured steps (compilation, optimizer states), then three measured ones, and the memory peak of
    one."""
    first = time.perf_counter()
    loss, norm = step()
    setting.wait()
    found: dict[str, Any] = {"loss": loss, "grad_norm": norm, "first_seconds": time.perf_counter() - first}
    found["seconds"] = setting.seconds(step, 3)
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        setting.wait()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _alike(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> bool:
    return all(abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]) for key in ("loss", "grad_norm"))


def _load_of(batches: list[MultimodalBatch]) -> Load:
    """Return the largest micro-batch in the form that the plan takes."""
    loads = [
        Load(b.num_tokens, int(b.loss_mask.sum()), 0 if b.pixel_values is None else len(b.pixel_values))
        for b in batches
    ]
    return replace(max(loads, key=lambda load: load.tokens), micro_batches=len(batches))


def _forget(setting: Setting) -> None:
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()
