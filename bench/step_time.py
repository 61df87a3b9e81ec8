"""Show where the time of a run's steps went: busy and idle seconds per actor, and the driver's own share.

    python -m bench.step_time runs/demo/run --json runs/bench/step_time.json

Reads `metrics.jsonl` of any run. Busy seconds are the actors' own clocks: an engine is busy while it holds a group of
the step's batch, the reward actors while they score, the learner during an update. Sync is the driver's wait from pause
to resume, in which engines and learner both work. What is left of the step's wall time is idle; where an engine already
generates the next batch, its work of one batch may exceed a step. `driver` is the time it waited for nobody.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.common import report
from saccade.observe.metrics import read_metrics


def split(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means per step over `records`: wall time, busy and idle seconds by actor, and the driver's share."""
    steps = len(records)
    total = sum(r["seconds"]["total"] for r in records) / steps
    sync = sum(r["seconds"]["sync"] for r in records) / steps
    busy: dict[str, float] = {}
    for record in records:
        for name, seconds in record["busy"].items():
            if name.startswith("generate/") or name in ("reward", "learn/total"):
                busy[name] = busy.get(name, 0.0) + seconds / steps
    learner = busy.pop("learn/total", 0.0)
    rewards = busy.pop("reward", 0.0)
    actors = {name.removeprefix("generate/"): {"work": value, "sync": sync} for name, value in sorted(busy.items())}
    actors |= {"learner": {"work": learner, "sync": sync}, "rewards": {"work": rewards, "sync": 0.0}}
    for times in actors.values():
        times["idle"] = max(0.0, total - times["work"] - times["sync"])
    driver = sum(r["seconds"]["driver"] for r in records) / steps
    waits = {name: sum(r["seconds"][name] for r in records) / steps for name in ("rollout", "learn", "sync")}
    return {
        "steps": steps,
        "step_seconds": total,
        "actors": actors,
        "driver_waits": waits,
        "driver_seconds": driver,
        "driver_share": driver / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--skip", type=int, default=3, help="leave out this many steps at the beginning")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = split(read_metrics(arguments.run)[arguments.skip :])
    table = Table(title=f"seconds per step, mean of {results['steps']} steps of {results['step_seconds']:.3f} s")
    for column in ("actor", "own work", "weight sync", "idle"):
        table.add_column(column, justify="right")
    for name, times in results["actors"].items():
        table.add_row(name, *(f"{times[k]:.3f}" for k in ("work", "sync", "idle")))
    share = f"{results['driver_share']:.1%} of the step"
    table.add_row("driver", f"{results['driver_seconds']:.3f} ({share})", "", "")
    report("step_time", results, table, arguments.json)


if __name__ == "__main__":
    main()
