"""The learner on the device against the learner on the CPU, on tiny models: gradients, ZeRO stages, precisions, resume.

The reference is TorchEngine in float32 on the CPU. AdamW's first moment after one step is the gradient times 1 - beta1,
so every engine's gradients can be read from its state, however they are partitioned. In bfloat16, ZeRO-3 is compared
with ZeRO-2, whose buffers are loaded plainly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.gpu_parts.common import Setting, join_alone
from bench.memory_process import Case, make_batches
from learner.algorithm.objective import GlobalCounts
from learner.config import AlgorithmConfig, Cispo, Current, Kl, LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.engines.protocol import TrainEngine
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import Lora, ModelConfig
from vlm.families.registry import load_adapter
from vlm.media.types import MediaKind
from vlm.tiny import TinySizes, build_tiny

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava", "pixtral", "internvl", "gemma3", "llama")
"""The tested families. Gemma3's layers have windows, so its rows are padded, not packed."""
TOLERANCE = 1e-4
"""Allowed error of float32 gradients, as a share of the largest gradient of the tensor."""
LONG = 2048
"""Length of the row, in tokens, on which positions in bfloat16 are compared."""


def run(setting: Setting) -> dict[str, Any]:
    families = FAMILIES[:1] if setting.small else FAMILIES
    found: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        for number, family in enumerate(families):
            path = build_tiny(family, Path(folder) / family)
            adapter, options = load_adapter(str(path)), _options(path)
            if number == 0:
                join_alone(replace(options, device=setting.device))
            found[family], own = _family(setting, adapter, options, every_stage=number == 0)
            checks |= {f"{family}: {what}": holds for what, holds in own.items()}
        path = build_tiny("qwen2_5_vl", Path(folder) / "long", sizes=TinySizes(max_positions=2 * LONG))
        found["long"], own = _long_positions(setting, load_adapter(str(path)), _options(path))
    return {**found, "checks": checks | own}


def _options(path: Path) -> LearnerOptions:
    return LearnerOptions(
        ModelConfig(str(path), dtype="float32"),
        100,
        device="cpu",
        algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
        learner=LearnerConfig(zero_stage=0, learning_rate=1e-3, max_grad_norm=1e9, gradient_checkpointing=()),
    )


def _staged(options: LearnerOptions, stage: Literal[0, 1, 2, 3], **model: Any) -> LearnerOptions:
    """Return the options with a ZeRO stage, and with other knobs of the model."""
    learner = replace(options.learner, zero_stage=stage)
    return replace(options, model=replace(options.model, **model), learner=learner)


def _family(
    setting: Setting, adapter: MultimodalAdapter, options: LearnerOptions, *, every_stage: bool
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return the errors of gradients by engine for one family. The first family also tests every stage, resume, LoRA
    and the rest."""
    on_device = replace(options, device=setting.device)
    kinds: tuple[MediaKind, ...] = ("image",) if "image" in adapter.modalities else ()
    batches, counts = work_of(adapter, image=bool(kinds))
    options, on_device = (replace(o, media_kinds=kinds) for o in (options, on_device))
    exact = gradients(TorchEngine(options, adapter), batches, counts, options)
    engines: dict[str, Any] = {"ZeRO-2": _staged(on_device, 2)}
    if every_stage:
        others: tuple[Literal[0, 1, 3], ...] = (0, 1, 3)
        engines |= {f"ZeRO-{stage}": _staged(on_device, stage) for stage in others}
        checkpointed = replace(on_device.learner, gradient_checkpointing=("language", "vision"))
        engines["checkpointed"] = replace(on_device, learner=checkpointed)
    errors = {}
    for name, own in engines.items():
        errors[name] = worst(gradients(DeepSpeedEngine(own, adapter), batches, counts, own), exact)
    checks = {f"{name}: gradients of the CPU": error <= TOLERANCE for name, error in errors.items()}
    found: dict[str, Any] = {"errors": errors}
    if every_stage:
        for name, changed in (
            ("LoRA", _staged(on_device, 2, lora=Lora(4))),
            ("reference", replace(_staged(on_device, 2), algorithm=replace(on_device.algorithm, kl=Kl(0.1)))),
            ("bfloat16, ZeRO-2", _staged(on_device, 2, dtype="bfloat16")),
            ("bfloat16, ZeRO-3", _staged(on_device, 3, dtype="bfloat16")),
        ):
            checks[f"{name}: resumes with the identical next step"] = _resumes(adapter, batches, counts, changed)
    return found, checks


def work_of(adapter: MultimodalAdapter, *, image: bool) -> tuple[list[MultimodalBatch], GlobalCounts]:
    """Make two micro-batches of completions of unequal groups, each with an image if the family takes one."""
    case = Case("tiny", rows=2, prompt=160, completion=24, image=56 if image else 0)
    batches = make_batches(case, adapter)
    completions = case.micro_batches * case.rows * case.completions
    return batches, GlobalCounts(float(completions * case.completion), float(completions))


def gradients(
    engine: TrainEngine, batches: Sequence[MultimodalBatch], counts: GlobalCounts, options: LearnerOptions
) -> dict[str, Tensor]:
    """Return parameter -> gradient of one step, on the CPU in float64."""
    engine.train_step(batches, micro_loss(options, counts))
    moments = ((name, tensor) for name, tensor in engine.state_tensors() if name.startswith("exp_avg/"))
    return {name: tensor.detach().double().cpu() / (1 - options.learner.betas[0]) for name, tensor in moments}


def worst(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Return the largest error of a tensor, as a share of its largest entry. For tiny tensors, it is a share of the
    largest entry of all tensors."""
    assert found.keys() == exact.keys(), sorted(found.keys() ^ exact.keys())[:5]
    largest = max(float(tensor.abs().max()) for tensor in exact.values())
    return max(
        float((found[name] - tensor).abs().max()) / max(float(tensor.abs().max()), 1e-3 * largest)
        for name, tensor in exact.items()
    )


def _resumes(
    adapter: MultimodalAdapter, batches: Sequence[MultimodalBatch], counts: GlobalCounts, options: LearnerOptions
) -> bool:
    """Take a step, load the state into another engine, and take one more step in both: the states must be equal to the
    bit."""
    loss, first = micro_loss(options, counts), DeepSpeedEngine(options, adapter)
    if options.algorithm.kl is not None:
        batches = [replace(b, reference_logprobs=first.logprobs(b, reference=True)) for b in batches]
    first.train_step(batches, loss)
    saved = {name: tensor.detach().clone().cpu() for name, tensor in first.state_tensors()}
    second = DeepSpeedEngine(options, adapter)
    second.load_state_tensors(lambda name, shape: saved[name].view(*shape), 1)
    for engine in (first, second):
        engine.train_step(batches, loss)
    states = [dict(engine.state_tensors()) for engine in (first, second)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def _long_positions(
    setting: Setting, adapter: MultimodalAdapter, options: LearnerOptions
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Check rotary positions far from the start of a row: bfloat16 must be as close to float32 under ZeRO-3 as under
    ZeRO-2."""
    case = Case("long", rows=1, prompt=LONG - 64, completion=64, completions=1, image=56, micro_batches=1)
    batch = make_batches(case, adapter)[0]
    mask = batch.loss_mask
    exact = TorchEngine(options, adapter).logprobs(batch)[mask]
    distances: dict[str, float] = {}
    buffers: dict[str, bool] = {}
    stages: tuple[Literal[2, 3], ...] = (2, 3)
    for stage in stages:
        own = _staged(replace(options, device=setting.device), stage, dtype="bfloat16")
        engine = DeepSpeedEngine(own, adapter)
        distances[f"ZeRO-{stage}"] = float((engine.logprobs(batch)[mask] - exact).abs().mean())
        rotary = [b for name, b in engine.policy.named_buffers() if name.endswith("inv_freq")]
        buffers[f"ZeRO-{stage}: rotary buffers in float32"] = all(b.dtype == torch.float32 for b in rotary)
    near = distances["ZeRO-3"] <= 1.25 * distances["ZeRO-2"]
    return {"mean_difference": distances}, {**buffers, "ZeRO-3 as near float32 as ZeRO-2": near}
