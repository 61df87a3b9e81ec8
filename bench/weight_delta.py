"""The share of bfloat16 weights that one optimizer step changes: what a transfer of differences would have to send.

A random Qwen2.5-VL of 1M parameters takes steps of Adam on float32 weights, on groups of random completions with random
rewards, as in `bench.learner`. Before and after each step its weights are rounded to bfloat16, as the engines get them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench.common import median
from bench.learner_work import MODELS, SHAPES, batches_of, make_groups, rows_of
from learner.algorithm.objective import GlobalCounts
from learner.config import AlgorithmConfig, Cispo, Current, LearnerConfig
from learner.engines.torch_engine import TorchEngine
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

LEARNING_RATES = (1e-6, 1e-5, 1e-4)
MODEL, SHAPE = "1M", SHAPES["balanced"]
GROUPS, BATCHES, BUDGET = 4, 4, 8192
"""Groups of a step; batches that take turns; positions of a micro-batch."""
WARMUP, STEPS = 8, 8
"""Steps until Adam's moments have settled, and steps that are measured."""


def rounded(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: p.detach().to(torch.bfloat16) for name, p in engine.policy.named_parameters()}


def changed_share(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    changed = sum(int((after[name] != value).sum()) for name, value in before.items())
    return changed / sum(value.numel() for value in before.values())


def sent_share(changed: float) -> float:
    """The bytes of an exact difference against all bytes: a bit for each value, and two bytes for each changed one."""
    return 1 / 16 + changed


def measure_delta() -> dict[str, Any]:
    """Learning rate -> shares, medians over the steps."""
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        path = MODELS[MODEL].build(Path(folder) / MODEL)
        return {f"{rate:g}": measure_rate(path, rate) for rate in LEARNING_RATES}


def measure_rate(path: Path, rate: float) -> dict[str, float]:
    adapter = load_adapter(str(path))
    options = LearnerOptions(
        ModelConfig(str(path), dtype="float32"),
        WARMUP + STEPS,
        device="cpu",
        algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
        learner=LearnerConfig(learning_rate=rate, micro_batch=BUDGET, gradient_checkpointing=()),
    )
    engine = TorchEngine(options, adapter)
    groups, media = make_groups(adapter, SHAPE, GROUPS * BATCHES, MODELS[MODEL].vocabulary)
    batches = [
        batches_of(rows_of(adapter, groups[i::BATCHES], media, share=True, budget=BUDGET), adapter, BUDGET)
        for i in range(BATCHES)
    ]
    completions = GROUPS * SHAPE.K
    loss = micro_loss(replace(options), GlobalCounts(completions * SHAPE.new, completions))
    shares = []
    for step in range(WARMUP + STEPS):
        before = rounded(engine)
        engine.train_step(batches[step % BATCHES], loss)
        shares.append(changed_share(before, rounded(engine)))
    changed = median(shares[WARMUP:])
    return {"changed": changed, "sent": sent_share(changed)}


def delta_table(results: dict[str, Any]) -> Table:
    table = Table(title="bfloat16 weights changed by a step")
    for column in ("learning rate", "changed", "bytes of an exact difference"):
        table.add_column(column, justify="right")
    for rate, r in results.items():
        table.add_row(rate, f"{r['changed']:.1%}", f"{r['sent']:.1%}")
    return table
