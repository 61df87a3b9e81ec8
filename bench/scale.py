"""Measure what the driver costs with 1 to 128 engines, simulated ones as Ray actors.

    python -m bench.scale --json runs/bench/scale.json

Loop, pipeline, pool, admission, handles, learner group and weight sync are those of a run; what a GPU computes is
simulated (`scale_actors.py`), with published times (`scale_settings.py`). Each engine has 32 groups in flight, those of
one step and of `staleness` steps ahead. The learner grows with the fleet, from the published setting on, so that a step
takes as long at any number of engines. All latencies are shortened alike (`faster`), so that about as many groups go
through in a second at any number of engines as a machine with two cores can simulate.

driver CPU     of all threads of the driver's process, Ray's included, over the groups that were trained in that time
driver memory  resident, at the end of each step
idle           share of a step in which the learner waits for its batch; `sync`: that of the weight sync
late           seconds of a group in its engine over those that were simulated: above 1, the machine does not keep up
pixels         bytes of every object with an image in it that the driver deserializes
kB/group       all that the driver's TCP connections receive. Ray returns objects of less than 100 kB to the owner of a
               call, which is the driver: these are tokens, and it hands them on without deserializing them
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from bench.common import report
from bench.scale_run import fleet, measured
from bench.scale_settings import SETTINGS


def faster_for(engines: int) -> float:
    """How much shorter all latencies are: as many groups pass in a second as with 64 engines in real time, up to 8x."""
    return min(8.0, 64 / engines)


def one(model: str, engines: int, faster: float, warmup: int, steps: int) -> dict[str, Any]:
    """Measure in this process, whose Ray has started."""
    run = fleet(SETTINGS[model], engines, faster)
    return {"faster": faster, **asyncio.run(measured(run, warmup, steps))}


def in_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure in a process and a Ray of its own, so that memory is that of one fleet."""
    command = [sys.executable, "-m", "bench.scale", "--here", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def show(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="What the driver costs, by the number of simulated engines")
    columns = ("in flight", "groups/s", "CPU ms/group", "MiB", "idle", "sync", "late", "pixels", "kB/group")
    for column in ("model", "engines", "faster", *columns):
        table.add_column(column, justify="right")
    for name, r in results.items():
        model, engines = name.rsplit(" ", 1)
        figures = (f"{r['in_flight']:.0f}", f"{r['groups_per_second']:.0f}", f"{r['cpu_ms_per_group']:.2f}")
        memory = (f"{r['resident_mib'][0]:.0f} to {r['resident_mib'][-1]:.0f}",)
        shares = (f"{r['idle_share']:.1%}", f"{r['sync_share']:.1%}", f"{r['late']:.2f}")
        through = (str(r["pixel_bytes"]), f"{r['received_bytes_per_group'] / 1e3:.1f}")
        table.add_row(model, engines, f"{r['faster']:g}x", *figures, *memory, *shares, *through)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=6, help="steps measured, after the warm-up")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.here:
        # Ray gives way to other processes, but here the workers stand for machines of their own.
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            object_store_memory=4 * 2**30,
            _system_config={"worker_niceness": 0},
        )
        (model,), (engines,) = a.model, a.engines
        print(json.dumps(one(model, engines, faster_for(engines), a.warmup, a.steps)))
        return
    results: dict[str, dict[str, Any]] = {}
    for model in a.model:
        for engines in a.engines:
            given = ["--model", model, "--engines", str(engines), "--steps", str(a.steps), "--warmup", str(a.warmup)]
            results[f"{model} {engines}"] = in_process(given)
            Console(width=140).print(show(results))
    settings = {name: asdict(setting) for name, setting in SETTINGS.items()}
    report("scale", {"settings": settings, "results": results}, show(results), a.json)


if __name__ == "__main__":
    main()
