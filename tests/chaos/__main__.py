"""`python -m tests.chaos`: many kills, and the table."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.chaos.harness import KINDS, Chaos

ON_NODES = ("driver", "node")
"""Kinds that are killed once in so many kills, since each takes longer than the others together."""
RARE = 12


def say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--engine", choices=("simulated", "vllm"), default="simulated")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    given = parser.parse_args()
    say(f"seed {given.seed}")
    rng = random.Random(given.seed)
    often = [kind for kind in KINDS if kind not in ON_NODES]
    if given.engine == "simulated":
        often.remove("engine core")
    rare = [kind for kind in ON_NODES if kind != "node" or given.nodes]
    learner = {"ranks": given.ranks, "zero_stage": given.zero}
    with (
        tempfile.TemporaryDirectory() as directory,
        Chaos(Path(directory), given.engine, given.seed, nodes=given.nodes, learner=learner) as chaos,
    ):
        try:
            chaos.wait_for_step()
            while len(chaos.result.kills) < given.kills:
                chaos.random_kill(rare if rng.random() < 1 / RARE else often, share_stopped=0.05)
                kill = chaos.result.kills[-1]
                how = "stopped" if kill.stopped else "killed"
                say(f"{len(chaos.result.kills)}: {kill.kind} {how}, a step after {kill.seconds:.1f} s")
            chaos.stop()
            chaos.check()
        finally:
            say(chaos.log())
            say(chaos.result.table())
    if chaos.result.lost or chaos.result.doubled or chaos.result.left_behind:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
