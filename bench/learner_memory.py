"""Compare the peak memory of this learner, with a vocabulary of 152k, with that of a bare loop, which holds all logits.

    python -m bench.learner_memory

`head`: hidden states to log-probabilities and back, alone. `step`: a whole optimizer step. Each in a fresh process, in
which glibc gives freed memory back at once (one arena, no caching of large blocks), so that the peak is what is held
together and not what was ever freed. The peak is counted from what the process held before the first step. Seconds are
those of the second step in another process with the allocator as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

VOCABULARY, HIDDEN, ROWS = 151_936, 256, 2048
"""Qwen's vocabulary, the hidden size, and the trained tokens of one step."""
PARTS = ("head", "step")
SYSTEMS = ("bare", "saccade")
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def run_memory(folder: Path) -> dict[str, Any]:
    """Return `{part: {system: {"peak_bytes", "baseline_bytes", "seconds", "loss"}}}`."""
    from bench.learner_work import Model
    from vlm.tiny import TinySizes

    path = Model(VOCABULARY, TinySizes(hidden=HIDDEN, intermediate=512)).build(folder / "152k")
    return {
        part: {
            system: _run(part, system, path, ALLOCATOR) | {"seconds": _run(part, system, path, {})["seconds"]}
            for system in SYSTEMS
        }
        for part in PARTS
    }


def _run(part: str, system: str, path: Path, allocator: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.learner_memory", "--part", part, "--system", system, "--model", str(path)]
    environment = {**os.environ, **allocator, "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_head(system: str) -> dict[str, Any]:
    """Measure forward and backward of the head alone, on the same hidden states."""
    import torch

    from bench.learner_work import chosen_logprobs
    from learner.model.logprobs import chunked_logprobs

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.05).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)

    def step() -> float:
        if system == "bare":
            logprobs = chosen_logprobs(torch.nn.functional.linear(hidden, weight), targets)
        else:
            logprobs = chunked_logprobs(hidden, weight, targets)[0]
        loss = -logprobs.mean()
        loss.backward()
        hidden.grad = weight.grad = None
        return loss.item()

    return _measure(step)


def measure_step(system: str, path: Path) -> dict[str, Any]:
    """Measure a whole step: 8 completions of 256 tokens after a prompt of 16."""
    from bench.learner import learner_options, make_engine
    from bench.learner_work import Shape, batches_of, make_groups, plain_batches, rows_of
    from bench.trl_step import BareStep
    from learner.algorithm.objective import GlobalCounts
    from learner.update import micro_loss
    from vlm.families.registry import load_adapter

    adapter, options = load_adapter(str(path)), learner_options(path, 8192)
    shape = Shape({}, edge=56, words=3, new=ROWS // 8)
    groups, media = make_groups(adapter, shape, 1, VOCABULARY)
    rows = rows_of(adapter, groups, media, share=system != "bare", budget=8192)
    if system == "bare":
        bare, plain = BareStep(path), plain_batches(rows, adapter, 8192)
        return _measure(lambda: bare(plain)[0])
    engine, batches = make_engine(options, adapter), batches_of(rows, adapter, 8192)
    loss = micro_loss(options, GlobalCounts(ROWS, 8))
    return _measure(lambda: engine.train_step(batches, loss).loss)


def _measure(step: Any) -> dict[str, Any]:
    """Return the peak of the first step over the bytes held before it, and the seconds of the second step."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    loss = step()
    peak = _status("VmHWM")
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"peak_bytes": peak - before, "baseline_bytes": before, "seconds": seconds, "loss": loss}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def memory_table(results: dict[str, Any]) -> Table:
    table = Table(
        title=f"vocabulary {VOCABULARY}, {ROWS} trained tokens, width {HIDDEN}: peak over what was held before"
    )
    for column in ("part", "system", "peak, MiB", "of bare", "s", "loss"):
        table.add_column(column, justify="right")
    for part, systems in results.items():
        for system, r in systems.items():
            share = f"1/{systems['bare']['peak_bytes'] / r['peak_bytes']:.1f}"
            peak = f"{r['peak_bytes'] / 2**20:.0f}"
            table.add_row(part, system, peak, share, f"{r['seconds']:.2f}", f"{r['loss']:.5f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "head":
        print(json.dumps(measure_head(arguments.system)))
    elif arguments.part == "step":
        print(json.dumps(measure_step(arguments.system, arguments.model)))
    else:
        with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
            Console(width=140).print(memory_table(run_memory(Path(folder))))


if __name__ == "__main__":
    main()
