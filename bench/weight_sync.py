"""Measure one weight synchronisation over gloo against a raw broadcast of the same bytes, in the same run.

    python -m bench.weight_sync --json runs/bench/weight_sync.json

Engines are processes that receive, digest and copy into place, without vLLM (`bench/weight_receiver.py`). The learner
is one rank, or with `--ranks 2` two under ZeRO-3, whose gathers are then part of it. Raw and real transfers take turns,
so that what slows the machine slows both; figures are medians. `raw`: the bytes, in buckets of the same size, two on
their way, from one place in memory to another. `pause`: from the first call to pause until all have resumed. `vs raw`:
pause without the gathers, divided by raw; the target is 2. `pause - load`: what generation loses beside putting the
weights in place; the target is 0.05 s. Last, which share of bfloat16 weights an update changes (`bench.weight_delta`).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from bench.common import median, report
from bench.weight_receiver import ProcessEngine
from weight_sync.gloo import IN_FLIGHT, broadcast, finish
from weight_sync.protocols import EngineHandle, TransferReport
from weight_sync.sender import WeightSender
from weight_sync.source import PolicySource
from weight_sync.sync import sync_weights

SIZES = {"1M": (128, 4), "50M": (768, 7), "200M": (1152, 12)}
"""Name -> (width, layers). A layer has four square matrices and two of width x 4 width, as a transformer's."""
TIMEOUT = 300.0
BUCKET_BYTES = 8 * 2**20


def make_model(width: int, layers: int) -> nn.Module:
    """A stack of matrices that is only sent, never computed with."""

    def layer() -> nn.Module:
        sizes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        return nn.ModuleList([nn.Linear(a, b) for a, b in sizes] + [nn.LayerNorm(width)])

    return nn.ModuleList([layer() for _ in range(layers)])


class BenchLearner:
    """`WeightLearner` of this process's rank. Rank 0 tells the others, through `commands`, to take part in a send."""

    def __init__(self, model: nn.Module, rank: int, commands: Sequence[Any] = ()) -> None:
        source = PolicySource(model, bucket_bytes=BUCKET_BYTES)
        self.nbytes = sum(meta.nbytes for meta in source.metadata())
        self.sender = WeightSender(
            source, backend="gloo", rank=rank, bucket_bytes=BUCKET_BYTES, timeout=TIMEOUT, host="127.0.0.1"
        )
        self._commands = commands

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None:
        self.sender.form_group(engines)

    def send_weights(self) -> TransferReport:
        for command in self._commands:
            command.send("send")
        report = self.sender.send()
        assert report is not None
        return report

    def raw(self, engines: Sequence[ProcessEngine]) -> float:
        """Broadcast as many bytes as the weights have, whatever they are. Returns the seconds until all have them."""
        transport: Any = self.sender._transport
        buffer = torch.zeros(self.nbytes, dtype=torch.uint8)
        for future in [engine.call("make_room", self.nbytes) for engine in engines]:
            future.result(TIMEOUT)
        begin = time.perf_counter()
        receiving = [engine.call("raw", BUCKET_BYTES) for engine in engines]
        in_flight: deque[Any] = deque()
        for start in range(0, self.nbytes, BUCKET_BYTES):
            if len(in_flight) == IN_FLIGHT:
                finish(in_flight.popleft())
            in_flight.append(broadcast(transport.group, buffer[start : start + BUCKET_BYTES]))
        while in_flight:
            finish(in_flight.popleft())
        for future in receiving:
            future.result(TIMEOUT)
        return time.perf_counter() - begin


def under_zero3(rank: int, ranks: int, port: int, size: tuple[int, int]) -> nn.Module:
    """The model, partitioned over `ranks` processes if there are several."""
    torch.set_num_threads(1)
    if ranks == 1:
        return make_model(*size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": ranks, "zero_optimization": {"stage": 3}}):
        return make_model(*size)


def other_rank(rank: int, ranks: int, port: int, size: tuple[int, int], pipe: Any) -> None:
    learner = BenchLearner(under_zero3(rank, ranks, port, size), rank)
    while pipe.recv() == "send":
        learner.sender.send()


def other_ranks(stack: ExitStack, ranks: int, port: int, size: tuple[int, int]) -> Iterator[Any]:
    """Start them. Yields the pipe of each."""
    context = multiprocessing.get_context("spawn")
    for rank in range(1, ranks):
        here, there = context.Pipe()
        process = context.Process(target=other_rank, args=(rank, ranks, port, size, there), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(here.send, "end")
        yield here


def measure_size(name: str, engine_counts: Sequence[int], ranks: int, repeats: int) -> dict[str, Any]:
    """Results by number of engines. Runs in a process of its own, since DeepSpeed's process group is global."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        commands = list(other_ranks(stack, ranks, port, SIZES[name]))
        learner = BenchLearner(under_zero3(0, ranks, port, SIZES[name]), 0, commands)
        engines = [stack.enter_context(closing(ProcessEngine(f"engine-{i}"))) for i in range(max(engine_counts))]
        return {str(count): measure(learner, engines[:count], repeats) for count in engine_counts}


def measure(learner: BenchLearner, engines: Sequence[ProcessEngine], repeats: int) -> dict[str, Any]:
    learner.form_weight_group(engines)
    raw, times = [], []
    for version in range(repeats + 1):
        gc.collect()
        raw.append(learner.raw(engines))
        times.append(sync_weights(learner, engines, version, timeout=TIMEOUT))
    each = [asdict(t) for t in times[1:]]  # the first one allocates
    middle = {name: median([t[name] for t in each]) for name in each[0]}
    return {
        "nbytes": learner.nbytes,
        "raw": median(raw[1:]),
        **middle,
        "vs_raw": median([(t["pause"] - t["gather"]) / r for t, r in zip(each, raw[1:], strict=True)]),
        "gather_share": median([t["gather"] / t["pause"] for t in each]),
        "pause_minus_load": median([t["pause"] - t["load"] for t in each]),
        "all": [{"raw": r, **t} for t, r in zip(each, raw[1:], strict=True)],
    }


def sync_table(results: dict[str, Any], ranks: int) -> Table:
    where = "one learner rank" if ranks == 1 else f"{ranks} learner ranks under ZeRO-3"
    table = Table(title=f"weight sync over gloo, seconds (median), {where}")
    fields = ("raw", "pause", "gather", "transfer", "load", "verify", "pause_minus_load")
    for column in ("model", "MB", "engines", *fields, "vs raw", "gather share"):
        table.add_column(column.replace("pause_minus_load", "pause - load"), justify="right")
    for size, counts in results.items():
        for count, r in counts.items():
            table.add_row(
                *(size, f"{r['nbytes'] / 1e6:.0f}", count, *(f"{r[field]:.3f}" for field in fields)),
                *(f"{r['vs_raw']:.2f}x", f"{r['gather_share']:.0%}"),
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--engines", default="1,2,4", help="comma-separated")
    parser.add_argument("--ranks", type=int, default=1, help="of the learner; more than one: under ZeRO-3")
    parser.add_argument("--repeats", type=int, default=5, help="measured transfers of each kind")
    parser.add_argument("--no-delta", action="store_true", help="leave out the shares of changed weights")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.engines.split(",")]
    results: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for name in arguments.sizes.split(","):
        here, there = context.Pipe()
        process = context.Process(target=answer, args=(there, name, counts, arguments.ranks, arguments.repeats))
        process.start()
        there.close()
        results[name] = here.recv()
        process.join()
        report("weight_sync", {}, sync_table({name: results[name]}, arguments.ranks), None)
    delta: dict[str, Any] = {}
    if not arguments.no_delta:
        from bench.weight_delta import delta_table, measure_delta  # the learner, which the engines do not need

        delta = measure_delta()
        report("weight_sync", {}, delta_table(delta), None)
    written = {"ranks": arguments.ranks, "bucket_bytes": BUCKET_BYTES, "results": results, "delta": delta}
    report("weight_sync", written, sync_table(results, arguments.ranks), arguments.json)


def answer(pipe: Any, *arguments: Any) -> None:
    pipe.send(measure_size(*arguments))


if __name__ == "__main__":
    main()
