"""Compare the memory that `saccade plan` predicts for a learner rank with the memory that it takes.

    python -m bench.memory --json runs/bench/memory.json

Each case runs in processes of its own, one per rank: two optimizer steps of two micro-batches on a random Qwen2.5-VL of
29M parameters (107M with a vocabulary of 152k words). Measured is the peak of resident memory over a baseline, which is
taken when the libraries are loaded and warm; on a GPU (`--device cuda`, one rank each) that of CUDA's allocator. The C
library is told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, one arena): resident
memory would otherwise count what the program no longer holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.common import report
from bench.memory_process import Case, learner_options, make_batches
from learner.engines.process_group import open_store
from learner.plan.memory import Load, MemoryPlan
from learner.plan.predict import predict
from vlm.families.registry import load_adapter
from vlm.tiny import TinySizes, build_tiny

SIZES = TinySizes(
    hidden=512,
    intermediate=1408,
    layers=8,
    heads=8,
    kv_heads=4,
    vision_hidden=256,
    vision_intermediate=704,
    vision_depth=4,
    vision_heads=4,
    max_image_tokens=256,
)
FRUGAL = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables of the measured processes."""
WIDE: dict[str, Any] = {"vocabulary": 152_000, "rows": 1, "prompt": 128, "image": 112}
BRIEF: dict[str, Any] = {"rows": 1, "prompt": 320, "completion": 32, "image": 336}
"""Smaller sizes for bfloat16, which is slow on CPUs without instructions for it."""
BFLOAT16 = {"dtype": "bfloat16"}
CASES = (
    Case("float32, ZeRO-0"),
    Case("float32, ZeRO-0, checkpointing", {"gradient_checkpointing": ("language", "vision")}, rows=4),
    Case("float32, ZeRO-0, vision frozen", model={"freeze": ("vision",)}),
    Case("float32, ZeRO-0, V = 152k", **WIDE),
    Case("float32, ZeRO-0, LoRA of rank 16", lora=16),
    Case("bfloat16, ZeRO-1", {"zero_stage": 1}, BFLOAT16, **BRIEF),
    Case("bfloat16, ZeRO-2", {"zero_stage": 2}, BFLOAT16, **BRIEF),
    Case("bfloat16, ZeRO-3", {"zero_stage": 3}, BFLOAT16, **BRIEF),
    Case("bfloat16, ZeRO-2, LoRA of rank 16", {"zero_stage": 2}, BFLOAT16, 16, **BRIEF),
    Case("float32, ZeRO-2, 2 ranks", {"zero_stage": 2, "ranks": 2}),
    Case("float32, ZeRO-3, 2 ranks", {"zero_stage": 3, "ranks": 2}),
)


def build_models(folder: Path, vocabulary: int) -> tuple[Path, Path]:
    """Make the model of a case, and one that is too small to matter."""
    big, small = folder / f"model-{vocabulary}", folder / "small"
    if not big.exists():
        words = [f"w{i}" for i in range(vocabulary)] or None
        build_tiny("qwen2_5_vl", big, sizes=SIZES, words=words)
    if not small.exists():
        build_tiny("qwen2_5_vl", small)
    return big, small


def predicted(case: Case, model: Path) -> MemoryPlan:
    """Predict the memory of the case's micro-batches, as `saccade plan` would."""
    adapter = load_adapter(str(model))
    options = learner_options(case, str(model))
    batch = make_batches(replace(case, micro_batches=1), adapter)[0]
    patches = 0 if batch.pixel_values is None else len(batch.pixel_values)
    load = Load(batch.num_tokens, int(batch.loss_mask.sum()), patches, case.micro_batches)
    return predict(options, adapter).memory(load)


def measure(case: Case, models: tuple[Path, Path], timeout: float = 900.0) -> list[dict[str, float]]:
    """Return, for each rank, the peak bytes by phase (see `bench.memory_process.train`). Raises RuntimeError if a rank
    fails."""
    options = learner_options(case, str(models[0]))
    store, port = open_store("127.0.0.1", 120.0)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"case": asdict(case), "model": str(models[0]), "small": str(models[1])}, file)
        file.flush()
        command = [sys.executable, "-m", "bench.memory_process", file.name]
        started = [
            subprocess.Popen(
                [*command, str(rank), str(port)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **FRUGAL},
            )
            for rank in range(options.learner.ranks)
        ]
        try:
            outputs = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
    del store
    for process, (_, error) in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{case.name}: a rank failed\n{error[-2000:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Return the predicted and the measured bytes of the rank that took most."""
    models = build_models(folder, case.vocabulary)
    plan, ranks = predicted(case, models[0]), measure(case, models)
    measured = max(value for peaks in ranks for name, value in peaks.items() if name.startswith("step"))
    return {
        "case": asdict(case),
        "predicted": plan.peak,
        "measured": measured,
        "ratio": plan.peak / measured,
        "phase": plan.phase,
        "kinds": dict(plan.device),
        "ranks": ranks,
    }


def table_of(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="peak memory of a learner rank over the baseline, MiB")
    for column in ("case", "predicted", "measured", "predicted / measured", "peak expected in"):
        table.add_column(column, justify="left" if column in ("case", "peak expected in") else "right")
    for r in results:
        figures = (f"{r['predicted'] / 2**20:.0f}", f"{r['measured'] / 2**20:.0f}", f"{r['ratio']:.2f}")
        table.add_row(r["case"]["name"], *figures, r["phase"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="run only cases whose names contain one of these")
    arguments = parser.parse_args()
    chosen = [c for c in CASES if any(part in c.name for part in arguments.only)]
    if arguments.device == "cuda":
        chosen = [replace(c, device="cuda") for c in chosen if "ranks" not in c.learner]
    results = []
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        for case in chosen:
            results.append(compare(case, Path(folder)))
            print(f"{case.name}: {results[-1]['ratio']:.3f}", flush=True)
    report("memory", {"results": results}, table_of(results), arguments.json)


if __name__ == "__main__":
    main()
