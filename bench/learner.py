"""Compare the learner's optimizer step with a bare transformers loop and with TRL's step, on the same samples, in one
run.

    python -m bench.learner --json runs/bench/learner.json            (needs the extra `bench`)

`bare`: a plain loop with transformers. `TRL`: the training step of its GRPOTrainer. `padded`: this learner, one
completion a row. `shared`: this learner as it runs. Float32, all cores, the same limit of positions per micro-batch;
steps are taken in turn, so that what slows the machine slows all. A table is printed only if losses and gradient norms
agree. `MFU`: FLOPs of what the system computes (`learner_work.model_flops`) per second, against a plain matrix product
in the same run; `of bare's`: the same with the FLOPs that the bare loop needs for these samples. Last, the memory of a
vocabulary of 152k (`bench.learner_memory`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.common import median, report
from bench.learner_memory import memory_table, run_memory
from bench.learner_work import MODELS, SHAPES, Shape, batches_of, make_groups, model_flops, plain_batches, rows_of
from bench.trl_step import LEARNING_RATE, MAX_GRAD_NORM, BareStep, TrlStep
from learner.algorithm.objective import GlobalCounts
from learner.config import AlgorithmConfig, Cispo, Current, LearnerConfig
from learner.engines.deepspeed_engine import DeepSpeedEngine
from learner.engines.process_group import join, open_store
from learner.types import LearnerOptions
from learner.update import micro_loss
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter

TOLERANCE = 1e-3
"""Relative tolerance of losses and gradient norms."""
MATMUL = 2048

Outcome = tuple[float, float]
"""`(loss, gradient norm before clipping)`."""


def learner_options(model_path: Path, budget: int) -> LearnerOptions:
    return LearnerOptions(
        ModelConfig(str(model_path), dtype="float32"),
        10_000,
        device="cpu",
        algorithm=AlgorithmConfig(loss=Cispo(), off_policy=Current()),
        learner=LearnerConfig(
            zero_stage=0,
            gradient_checkpointing=(),
            micro_batch=budget,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        threads=os.cpu_count() or 1,
    )


def make_engine(options: LearnerOptions, adapter: MultimodalAdapter) -> DeepSpeedEngine:
    """Make this learner on one rank. Its ban of placeholder tokens is off, since the other systems have none."""
    if not torch.distributed.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
        store, port = open_store("127.0.0.1", 60.0)
        join(options, 0, "127.0.0.1", port, store)
    engine = DeepSpeedEngine(options, adapter)
    engine.policy.head.banned = None
    return engine


def matmul_flops(size: int = MATMUL, repeats: int = 5) -> float:
    """Measure the FLOP/s of a plain float32 matrix product: the median of several, after an unmeasured one."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds[1:])


def take_turns(
    systems: dict[str, Callable[[], Outcome]], repeats: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, list[Outcome]], float]:
    """Return the seconds of each system's steps after the warm-up, the outcomes of all its steps, and the machine's
    FLOP/s."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in systems}
    rates = []
    for turn in range(warmup + repeats):
        rates.append(matmul_flops())
        for name, step in systems.items():
            start = time.perf_counter()
            outcomes[name].append(step())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds, outcomes, median(rates)


def check_agreement(outcomes: dict[str, list[Outcome]]) -> None:
    """Raise SystemExit if the loss or gradient norm of any step differs from that of the bare loop's first step."""
    loss, norm = outcomes["bare"][0]
    print("  loss and gradient norm:", "; ".join(f"{n} {o[0][0]:.6f} {o[0][1]:.6f}" for n, o in outcomes.items()))
    for name, steps in outcomes.items():
        for other in steps:
            if abs(other[0] - loss) > TOLERANCE * abs(loss) or abs(other[1] - norm) > TOLERANCE * norm:
                raise SystemExit(
                    f"{name} computes something else: its (loss, norm) is {other}, the bare loop's is {(loss, norm)}"
                )


@dataclass(frozen=True)
class Systems:
    """All systems, with one model."""

    adapter: MultimodalAdapter
    options: LearnerOptions
    bare: BareStep
    trl: TrlStep
    engine: DeepSpeedEngine

    @classmethod
    def load(cls, path: Path, budget: int, trl: TrlStep) -> Systems:
        adapter, options = load_adapter(str(path)), learner_options(path, budget)
        systems = cls(adapter, options, BareStep(path), trl, make_engine(options, adapter))
        torch.set_num_threads(options.threads)
        return systems


def measure_shape(systems: Systems, model: str, shape: Shape, repeats: int, warmup: int) -> dict[str, Any]:
    """Return the results by system. Raises SystemExit if the systems do not compute the same."""
    adapter, budget, engine = systems.adapter, systems.options.micro_batch.tokens, systems.engine
    groups, media = make_groups(adapter, shape, shape.groups[model], MODELS[model].vocabulary)
    single = rows_of(adapter, groups, media, share=False, budget=budget)
    together = rows_of(adapter, groups, media, share=True, budget=budget)
    plain = plain_batches(single, adapter, budget)
    padded = batches_of(single, adapter, budget, packed=False)
    shared = batches_of(together, adapter, budget)
    completions = len(groups) * shape.K
    tokens = completions * shape.new
    loss = micro_loss(systems.options, GlobalCounts(tokens, completions))

    def ours(batches: list[MultimodalBatch]) -> Outcome:
        result = engine.train_step(batches, loss)
        return result.loss, result.grad_norm

    steps: dict[str, Callable[[], Outcome]] = {
        "bare": partial(systems.bare, plain),
        "TRL": partial(systems.trl, plain),
        "padded": partial(ours, padded),
        "shared": partial(ours, shared),
    }
    seconds, outcomes, rate = take_turns(steps, repeats, warmup)
    check_agreement(outcomes)
    flops = partial(model_flops, systems.bare.model, adapter)
    each_row, positions = flops(single, images_once=False), sum(map(len, single))
    work = {
        "bare": (each_row, positions, len(plain)),
        "TRL": (each_row, positions, len(plain)),
        "padded": (flops(single, images_once=True), sum(b.num_tokens for b in padded), len(padded)),
        "shared": (flops(together, images_once=True), sum(b.num_tokens for b in shared), len(shared)),
    }
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        name: {
            "seconds": own,
            "all_seconds": seconds[name],
            "tokens_per_second": tokens / own,
            "against_bare": middle["bare"] / own,
            "against_trl": middle["TRL"] / own,
            **dict(zip(("flops", "positions", "micro_batches"), work[name], strict=True)),
            "matmul_flops": rate,
            "mfu": work[name][0] / own / rate,
            "mfu_of_bare": each_row / own / rate,
            **dict(zip(("loss", "grad_norm"), outcomes[name][0], strict=True)),
        }
        for name, own in middle.items()
    }


def speed_table(results: dict[str, Any]) -> Table:
    table = Table(title="learner step, same samples (median, systems in turn)")
    columns = ("model", "shape", "system", "s/step", "tokens/s", "positions", "MFU", "of bare's", "vs bare", "vs TRL")
    for column in columns:
        table.add_column(column, justify="right")
    for model, shapes in results.items():
        for shape, systems in shapes.items():
            for system, r in systems.items():
                table.add_row(
                    *(model, shape, system, f"{r['seconds']:.3f}", f"{r['tokens_per_second']:.0f}"),
                    *(str(r["positions"]), f"{r['mfu']:.0%}", f"{r['mfu_of_bare']:.0%}"),
                    *(f"{r['against_bare']:.2f}x", f"{r['against_trl']:.2f}x"),
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, help="measured steps of each system; default: depends on the model")
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured steps of each system before them")
    parser.add_argument("--budget", type=int, default=8192, help="token positions of one micro-batch")
    parser.add_argument("--only", choices=SHAPES, action="append", help="shapes; default: all")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated; empty: none")
    parser.add_argument("--no-memory", action="store_true", help="leave out the vocabulary of 152k")
    arguments = parser.parse_args()
    shapes = {name: SHAPES[name] for name in arguments.only or SHAPES}
    results: dict[str, dict[str, Any]] = {}
    memory: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        paths = {name: MODELS[name].build(Path(folder) / name) for name in filter(None, arguments.models.split(","))}
        # TRL comes first: once a process group exists, accelerate would treat the run as distributed.
        trainers = {name: TrlStep(path, Path(folder) / "trl", K=8) for name, path in paths.items()}
        for name, path in paths.items():
            systems = Systems.load(path, arguments.budget, trainers.pop(name))
            results[name] = {}
            for label, shape in shapes.items():
                print(f"{name}, {label}", flush=True)
                repeats = arguments.repeats or MODELS[name].repeats
                results[name][label] = measure_shape(systems, name, shape, repeats, arguments.warmup)
            del systems
        if not arguments.no_memory:
            memory = run_memory(Path(folder))
    if memory:
        report("learner", {}, memory_table(memory), None)
    written = {
        "models": {name: asdict(model) for name, model in MODELS.items()},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "micro_batch_tokens": arguments.budget,
        "results": results,
        "vocabulary_152k": memory,
    }
    report("learner", written, speed_table(results), arguments.json)


if __name__ == "__main__":
    main()
