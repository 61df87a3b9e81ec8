"""Measure groups scored per second: through 1 and 2 reward actors, and with the same functions in a plain loop.

    python -m bench.rewards --json runs/bench/rewards.json

`words` and `numbers` are the cheap comparisons; `latex` has math-verify compare expressions. Every repetition scores
fresh numbers and expressions, so that no cache answers. Overhead per completion is the wall time through one actor
minus that of the loop, over all completions: the two crossings (Ray, and the socket of the child process) and the
bookkeeping. Actors have one worker process each; the driver only waits, as in a run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.table import Table

from bench.common import median, report
from rewards.actor import RewardActor
from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from rewards.registry import build_rewards
from rollout.types import Completion, Prompt, PromptRef, RolloutGroup, Segment

SPECS = (RewardSpec("format", 0.5), RewardSpec("accuracy"))
TOKENS = 128
WORDS = ("red", "green", "blue", "circle", "square")
WORKLOADS: dict[str, Callable[[int], tuple[str, str]]] = {
    "words": lambda i: (WORDS[i % 5], WORDS[(i // 5) % 5]),
    "numbers": lambda i: (str(i), f"{i}.0" if i % 2 else str(i + 1)),
    "latex": lambda i: (f"\\frac{{{i}}}{{7}} + x", f"x + {i}/7" if i % 2 else f"x + {i}/8"),
}
"""Name -> a function that returns the gold answer and answer number i."""


def group(workload: str, first: int, completions: int) -> RolloutGroup:
    """Make K completions of one prompt. The gold answer is that of the first."""
    make = WORKLOADS[workload]
    gold = make(first)[0]
    texts = [f"<think>number {k}</think><answer>{make(first + k)[1]}</answer>" for k in range(completions)]
    ids, zeros = np.zeros(TOKENS, np.int32), np.zeros(TOKENS, np.float32)
    segment = Segment(ids, zeros, ids)
    prompt = Prompt(PromptRef(f"bench:{first}"), "?", ids, TOKENS, answer=gold)
    return RolloutGroup(prompt, ids, tuple(Completion((segment,), text, "stop", seed=0) for text in texts))


def batches(workload: str, repetitions: int, groups: int, completions: int) -> list[list[RolloutGroup]]:
    """Make repetitions of a batch. No text occurs in two of them."""
    starts = iter(range(1, repetitions * groups * completions + 1, completions))
    return [[group(workload, next(starts), completions) for _ in range(groups)] for _ in range(repetitions)]


def in_a_loop(batch: Sequence[RolloutGroup], score: Callable[[ScoringRequest], Any]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    for item in batch:
        score(ScoringRequest.of(item))
    return time.perf_counter() - begin


def through_actors(batch: Sequence[RolloutGroup], actors: Sequence[Any]) -> float:
    """Return the seconds from groups in the object store to summaries in the driver."""
    references = [ray.put(item) for item in batch]
    begin = time.perf_counter()
    calls = [actors[i % len(actors)].score.remote(reference) for i, reference in enumerate(references)]
    summaries = ray.get([summary for _, summary in calls])
    seconds = time.perf_counter() - begin
    assert all(all(summary.valid) for summary in summaries)
    return seconds


def measure(groups: int, completions: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Return the figures by workload."""
    loop = build_rewards(SPECS)
    loop.warm_up()
    actors = [ray.remote(RewardActor).options(num_cpus=0).remote(SPECS, 60.0) for _ in range(2)]
    ray.get([actor.start.remote() for actor in actors])
    results = {}
    for workload in WORKLOADS:
        seconds: dict[str, list[float]] = {"loop": [], "1": [], "2": []}
        data = iter(batches(workload, 3 * (repetitions + 1), groups, completions))
        for _ in range(repetitions + 1):  # in turns, so that a busy moment of the machine affects all three
            seconds["loop"].append(in_a_loop(next(data), loop))
            seconds["1"].append(through_actors(next(data), actors[:1]))
            seconds["2"].append(through_actors(next(data), actors))
        times = {name: median(values[1:]) for name, values in seconds.items()}
        results[workload] = {
            **{f"groups_per_second_{name}": groups / value for name, value in times.items()},
            "overhead_ms_per_completion": 1000 * (times["1"] - times["loop"]) / (groups * completions),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=64, help="groups per batch")
    parser.add_argument("--completions", type=int, default=8, help="completions per group")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        results = measure(arguments.groups, arguments.completions, arguments.repetitions)
    finally:
        ray.shutdown()
    shape = f"{arguments.groups} groups x {arguments.completions} completions"
    table = Table(title=f"format and accuracy, groups per second: {shape}")
    for column in ("answers", "plain loop", "1 worker", "2 workers", "overhead, ms per completion"):
        table.add_column(column, justify="right")
    for workload, figures in results.items():
        rates = [f"{figures[f'groups_per_second_{name}']:.0f}" for name in ("loop", "1", "2")]
        table.add_row(workload, *rates, f"{figures['overhead_ms_per_completion']:.3f}")
    sizes = {"groups": arguments.groups, "completions": arguments.completions}
    report("rewards", {**sizes, "workloads": results}, table, arguments.json)


if __name__ == "__main__":
    main()
