"""How near a step comes to its bound: generation and training beside each other, by staleness and admission.

    python -m bench.pipeline --json runs/bench/pipeline.json

A real engine and a real learner have one core each, and do the same work in every run: 8 prompts x 8 completions a step
with forced lengths. `equal`: 32 tokens each. `tail`: one prompt in eight has completions of 320 tokens.

The bound of a run is max(generation, training), each measured alone on the same actors after its steps, generation with
as many groups in flight. `ideal` is what overlap can give at best over taking turns: (Tg + Tt) / max(Tg, Tt).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.common import median, report
from bench.vs_trl import PROMPTS, K, our_config
from rollout.engines.protocol import SamplingParams
from saccade.config.load import config_tree, parse_config
from saccade.config.run_config import RunConfig
from saccade.fleet.pool import EnginePool, Request, Sent
from saccade.loop import step
from saccade.observe.metrics import read_metrics
from saccade.opening import open_run
from saccade.pipeline.admission import Windowed
from saccade.pipeline.groups import Group, GroupBuffer, State
from saccade.run import Run

SHORT, LONG, EVERY = 32, 320, 8
SCENARIOS = ("equal", "tail")


class ByRow(EnginePool[Any]):
    """The engines of another pool, which sample one row in EVERY with LONG tokens where there is a tail."""

    def __init__(self, pool: EnginePool[Any], tail: bool) -> None:
        super().__init__(pool.actors, by_load=True)
        self._tail = tail

    def sample(self, requests: Sequence[Request], sampling: SamplingParams, *, together: bool) -> list[Sent[Any]]:
        sent = []
        for request in requests:
            length = LONG if self._tail and request.prompt.ref.row % EVERY == 0 else SHORT
            forced = replace(sampling, ignore_eos=True, stop_token_ids=(), max_tokens_each=(length,) * K)
            sent += super().sample([request], forced, together=False)
        return sent


@dataclass(frozen=True)
class Unbounded(Windowed):
    """Generation alone: no update makes what is in flight older."""

    def stale(self, groups: GroupBuffer, step: int) -> list[Group]:
        return []


def config_of(model: Path, staleness: int, admission: str, steps: int, work: Path) -> RunConfig:
    """The configuration of `bench.vs_trl`, with one core for each side and the rows in the order of their file."""
    config = our_config(model, (LONG,), staleness, steps, work, admission=admission, kv_cache_gib=0.5)
    tree = config_tree(config)
    tree["data"]["shuffle"] = False
    tree["checkpoint"]["every"] = 0
    tree["cluster"]["resources"] = {role: {"CPU": 1} for role in ("rollout", "learner")}
    return parse_config(tree)


async def measured(run: Run, config: RunConfig, scenario: str, warmup: int, steps: int) -> dict[str, Any]:
    """Seconds per step of the whole, then of generation and of training alone, on the same actors."""
    total, staleness = warmup + steps, config.rollout.max_staleness
    async with run.rollouts.running():
        dispatcher: Any = run.rollouts.dispatcher
        dispatcher.pool = ByRow(dispatcher.pool, scenario == "tail")
        for number in range(total):
            if number == warmup:
                begin = time.perf_counter()
            await step(run, config)
        seconds = (time.perf_counter() - begin) / steps
        run.rollouts.admission = Unbounded(staleness, 10**6, PROMPTS)
        sealed = []
        for number in range(total, total + warmup + steps):
            if number == total + warmup:
                begin = time.perf_counter()
            run.rollouts.admit(number)
            sealed.append(await run.rollouts.batch(number))
        generation = (time.perf_counter() - begin) / steps
        while any(group.state is State.ISSUED for group in run.rollouts.groups.unsealed()):
            await asyncio.sleep(0.1)  # what was admitted ahead still takes a core
        training = []
        for batch in sealed[-steps:]:
            begin = time.perf_counter()
            run.learner.update(batch.groups, batch.summaries, run.version)
            training.append(time.perf_counter() - begin)
    records = read_metrics(run.directory)[warmup:]
    return {
        "seconds": seconds,
        "generation": generation,
        "training": sum(training) / steps,
        "staleness": sum(r["staleness"] for r in records) / len(records),
        "tokens": sum(r["tokens"] for r in records) / len(records),
        "dropped": sum(r["dropped"] for r in records),
        "phases": {k: median([r["seconds"][k] for r in records]) for k in records[0]["seconds"]},
    }


def one(model: Path, scenario: str, staleness: int, admission: str, warmup: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        config = config_of(model, staleness, admission, warmup + steps, Path(folder))
        with open_run(config, resume=False, address=None, display=None) as run:
            return asyncio.run(measured(run, config, scenario, warmup, steps))


def in_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure in a process of its own, so that no run warms up or fragments another."""
    command = [sys.executable, "-m", "bench.pipeline", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def show(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"{PROMPTS} prompts x {K} completions a step, forced lengths; means over the steps")
    columns = ("s/step", "generation", "training", "step / bound", "over taking turns", "ideal", "mean staleness")
    for column in ("lengths", "staleness", "admission", *columns, "dropped"):
        table.add_column(column, justify="right")
    turns = {name.split()[0]: r["seconds"] for name, r in results.items() if name.split()[1] == "0"}
    for name, r in results.items():
        scenario, staleness, admission = name.split()
        both = (r["generation"], r["training"])
        values = (r["seconds"], *both, r["seconds"] / max(both))
        gained = f"{turns[scenario] / r['seconds']:.2f}x" if scenario in turns else ""
        ideal = f"{sum(both) / max(both):.2f}x"
        texts = (*(f"{v:.2f}" for v in values), gained, ideal, f"{r['staleness']:.2f}", str(r["dropped"]))
        table.add_row(scenario, staleness, admission, *texts)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=12, help="steps measured, after the warm-up")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--admission", choices=("strict", "windowed"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.model is not None:
        print(json.dumps(one(a.model, a.scenario[0], a.staleness[0], a.admission, a.warmup, a.steps)))
        return
    from vlm.tiny import TinySizes, build_tiny

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
        model = build_tiny("qwen2_5_vl", Path(folder) / "model", sizes=TinySizes(layers=4))
        for scenario in a.scenario:
            for staleness in a.staleness:
                for admission in ("strict", "windowed") if staleness else ("strict",):
                    given = ["--model", str(model), "--scenario", scenario, "--staleness", str(staleness)]
                    given += ["--admission", admission, "--steps", str(a.steps), "--warmup", str(a.warmup)]
                    results[f"{scenario} {staleness} {admission}"] = in_process(given)
    report("pipeline", {"prompts": PROMPTS, "K": K, "tokens": [SHORT, LONG], "results": results}, show(results), a.json)


if __name__ == "__main__":
    main()
