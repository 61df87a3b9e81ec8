"""Measure how much of LoRA updates rounding loses on their way to engines in bfloat16.

    python -m bench.lora_rounding --json FILE

The learner computes W x + B A x, and the engines get W + B A rounded to bfloat16. The model is random with hidden size
512, and the updates have a given size relative to the weights (Frobenius norms, the same for every adapted layer).
Measured are the share of the update that the rounded weights keep, and the difference of the log-probabilities of both,
computed in bfloat16. Both are also compared with the same weights in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.common import report
from bench.gpu_parts.exact import work_of
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from vlm.config import Lora, ModelConfig
from vlm.families.registry import load_adapter
from vlm.tiny import TinySizes, build_tiny

EXPONENTS = (-4, -6, -7, -8, -9, -10, -12)
SIZES = TinySizes(hidden=512, intermediate=1024, layers=4, heads=8, initializer_range=0.02)
RANK = 16


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        rows = [measure(Path(folder), 2.0**exponent) for exponent in EXPONENTS]
    table = Table(title="LoRA updates in bfloat16 weights", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    report("lora_rounding", {"rows": rows}, table, chosen.json)
    return 0


def measure(folder: Path, size: float) -> dict[str, float]:
    """Return the figures for updates of `size` times the norm of their weight."""
    torch.manual_seed(0)
    path = build_tiny("qwen2_5_vl", folder / f"{size}", sizes=SIZES)
    adapter = load_adapter(str(path))
    options = LearnerOptions(
        ModelConfig(str(path), "bfloat16", lora=Lora(RANK)), 1, device="cpu", media_kinds=("image",)
    )
    learner = TorchEngine(options, adapter)
    batches, _ = work_of(adapter, image=True)

    def logprobs(engine: TorchEngine) -> Tensor:
        return torch.cat([engine.logprobs(batch)[batch.loss_mask] for batch in batches]).double()

    def holding(dtype: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        engine = TorchEngine(replace(options, model=ModelConfig(str(path), dtype)), adapter)
        with torch.no_grad():
            for name, parameter in engine.policy.model.named_parameters():
                parameter.copy_(tensors[name])
        return logprobs(engine)

    before = dict(learner.weight_source(2**20))
    updates = draw_updates(learner.policy.model, size)
    after = dict(learner.weight_source(2**20))
    arrived = {name: after[name].double() - before[name].double() for name in updates}
    total = sum(float(update.square().sum()) for update in updates.values())
    kept = sum(float((arrived[name] * update).sum()) for name, update in updates.items())
    lost = sum(float((arrived[name] - update).square().sum()) for name, update in updates.items())
    ours, theirs, start = logprobs(learner), holding("bfloat16", after), holding("bfloat16", before)
    exact = holding("float32", before | {name: before[name].double() + update for name, update in updates.items()})
    return {
        "update / weight": size,
        "kept": kept / total,
        "error / update": (lost / total) ** 0.5,
        "learner - engine": distance(ours, theirs),
        "learner - float32": distance(ours, exact),
        "engine - float32": distance(theirs, exact),
        "effect of the update": distance(exact, holding("float32", before)),
        "in bfloat16": distance(theirs, start),
    }


def draw_updates(model: nn.Module, size: float) -> dict[str, Tensor]:
    """Give every adapted layer a random update of `size` times its weight's norm. Returns parameter name -> update."""
    updates = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.normal_()
            b.normal_()
            scale = size * weight.double().norm() / (layer.scaling["default"] * (b.double() @ a.double()).norm())
            b.mul_(scale)
            updates[name.removeprefix("base_model.model.") + ".weight"] = layer.scaling["default"] * (
                b.double() @ a.double()
            )
    return updates


def distance(a: Tensor, b: Tensor) -> float:
    """Return the mean |difference|."""
    return float((a - b).abs().mean())


if __name__ == "__main__":
    sys.exit(main())
