"""Chaos: a run on a Ray cluster of several nodes, and somebody who kills its processes, each at any moment.

    choose a kind and one of its processes, kill or stop it ─▶ wait until a step was trained after it ─▶ and again

A driver that is killed is started again with --resume, and a node that is killed is replaced, as a cluster's operator
would. At the end the journal is compared with the data: every prompt that was handed out is trained once, or is in the
ledger.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

from rollout.data.source import PromptSource
from saccade.config.load import load_config
from saccade.config.options import config_adapter, data_options
from saccade.demo.shapes import make_shapes
from saccade.observe.journal import trained
from saccade.observe.metrics import read_metrics
from vlm.tiny import build_tiny

KINDS = {
    "rollout actor": ("ray::rollout-", "ray::RolloutActor", "ray::SimulatedActor"),
    "engine core": ("VLLM::EngineCore",),
    "reward actor": ("ray::reward-", "ray::RewardActor"),
    "reward worker": ("rewards.process.child",),
    "data actor": ("ray::data", "ray::DataActor"),
    "learner rank": ("ray::learner-", "ray::LearnerWorker"),
    "driver": ("tests.chaos.driver",),
    "node": ("raylet/raylet",),
}
"""How the processes of each kind are called in the list of processes."""
NEVER_STOPPED = ("driver", "node", "reward worker")
"""Kinds that are only killed: nobody replaces a driver or a node that stands still, and rewards that hang are a
time-out verdict on their group, which in batches this small ends the run (reward.max_failed_share)."""
RECOVERY_SECONDS = 420.0
"""Seconds in which a step must follow a kill."""


@dataclass(frozen=True)
class Kill:
    kind: str
    stopped: bool
    seconds: float
    """Until the next step was trained."""


@dataclass
class Result:
    kills: list[Kill] = field(default_factory=list)
    lost: int = 0
    """Prompts that were handed out, and are neither trained nor in the ledger."""
    doubled: int = 0
    """Prompts that were trained more than once in an epoch."""
    left_behind: list[str] = field(default_factory=list)
    """Processes of the run that live when it has ended."""

    def table(self) -> str:
        rows = [f"{'kind':14} {'killed':>6} {'stopped':>7} {'median s':>9} {'worst s':>8}"]
        for kind in KINDS:
            own = [kill for kill in self.kills if kill.kind == kind]
            if own:
                stopped = sum(kill.stopped for kill in own)
                seconds = [kill.seconds for kill in own]
                figures = f"{median(seconds):9.1f} {max(seconds):8.1f}"
                rows.append(f"{kind:14} {len(own) - stopped:6} {stopped:7} {figures}")
        rows.append(f"prompts lost {self.lost}, doubled {self.doubled}; left behind {len(self.left_behind)}")
        return "\n".join(rows)


class Chaos:
    """One run under chaos, in `directory`."""

    def __init__(self, directory: Path, engine: str, seed: int, *, nodes: int = 0, **changes: Any) -> None:
        """`nodes`: how many Ray nodes there are beside the head's, on which engines and rewards may be placed; with 0
        the run has a Ray of its own."""
        self.directory, self.engine, self._random = directory, engine, random.Random(seed)
        self.run = directory / "run"
        self.config = directory / "chaos.yaml"
        self._driver: subprocess.Popen[bytes] | None = None
        self._nodes, self._cluster = nodes, None
        self.result = Result()
        make_shapes(directory / "shapes", seed=0, train_rounds=2, unseen_rounds=1)
        build_tiny("qwen2_5_vl", directory / "model")
        self.config.write_text(yaml.safe_dump(self._settings(changes)))

    def _settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        return {
            "output_dir": str(self.run),
            "steps": 100_000,
            "seed": 1,
            "model": {"path": str(self.directory / "model"), "dtype": "float32"},
            "data": {"train": [str(self.directory / "shapes/train.parquet")], "max_prompt_length": 256},
            "rollout": {
                "engines": 2,
                "num_generations": 2,
                "max_completion_length": 12,
                "kv_cache_gib": 0.1,
                "engine_options": {"max_num_seqs": 32},
                **changes.pop("rollout", {}),
            },
            "reward": {"functions": [{"name": "tests.helpers.rewards_for_tests:letters"}], "actors": 2},
            "learner": {"prompts_per_step": 4, "learning_rate": 1e-4, **changes.pop("learner", {})},
            "checkpoint": {"every": 10},
            "cluster": {
                "device": "cpu",
                "timeout": changes.pop("timeout", 240),
                "resources": {"rollout": {"CPU": 1}, "learner": {"CPU": 1}, "reward": {"CPU": 0.5}},
            },
            **changes,
        }

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Chaos:
        if self._nodes:
            from ray.cluster_utils import Cluster

            self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
            for _ in range(self._nodes):
                self._cluster.add_node(num_cpus=4)
        self._start()
        return self

    def __exit__(self, *given: object) -> None:
        self._end(signal.SIGKILL)
        if self._cluster is not None:
            self._cluster.shutdown()

    def _start(self, *resume: str) -> None:
        address = self._cluster.address if self._cluster is not None else ""
        command = [sys.executable, "-m", "tests.chaos.driver", str(self.config), self.engine, address, *resume]
        with (self.directory / "driver.log").open("ab") as log:
            self._driver = subprocess.Popen(command, stdout=log, stderr=log)

    def _end(self, how: signal.Signals) -> None:
        if self._driver is not None and self._driver.poll() is None:
            self._driver.send_signal(how)
            self._driver.wait(120)

    def stop(self) -> None:
        """Let the run save its state and end, as Ctrl-C does, and count what it left behind."""
        ours = {process.pid for process in self._processes()}
        self._end(signal.SIGINT)
        _, alive = psutil.wait_procs([psutil.Process(pid) for pid in ours if psutil.pid_exists(pid)], timeout=30)
        names = [name for kind, names in KINDS.items() if kind != "node" for name in names]  # the cluster's stay
        self.result.left_behind = [
            text for process in alive if (text := _command(process)) and any(name in text for name in names)
        ]

    # ------------------------------------------------------------------ chaos

    def kill(self, kind: str, *, stop: bool = False) -> None:
        """Kill (or stop) a process of this kind, and wait until a step was trained after it.

        Raises TimeoutError when none is in RECOVERY_SECONDS, RuntimeError when the run has ended."""
        found = [p for p in self._processes() if any(_command(p).startswith(name) for name in KINDS[kind])]
        if kind in ("driver", "node", "reward worker"):
            found = [p for p in self._processes() if any(name in _command(p) for name in KINDS[kind])]
        found = [p for p in found if "--head" not in _command(p)]  # a driver ends with the node that it is on
        if not found:
            return
        victim, done = self._random.choice(sorted(found, key=lambda p: p.pid)), self.steps()
        begin = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
        if kind == "driver":
            assert self._driver is not None
            self._driver.wait(60)
            self._start("--resume")
        if kind == "node":
            self._cluster.add_node(num_cpus=4)  # type: ignore[attr-defined]
        self.wait_for_step(done)
        self.result.kills.append(Kill(kind, stop, time.monotonic() - begin))

    def random_kill(self, kinds: Sequence[str], share_stopped: float) -> None:
        """Kill one of these kinds, after a moment."""
        time.sleep(self._random.uniform(0.0, 2.0))
        kind = self._random.choice(list(kinds))
        self.kill(kind, stop=kind not in NEVER_STOPPED and self._random.random() < share_stopped)

    def steps(self) -> tuple[int, float]:
        """How many steps were trained so far: the last one, and when."""
        with suppress(OSError, ValueError):
            path = self.run / "metrics.jsonl"
            return len(read_metrics(self.run)), path.stat().st_mtime
        return 0, 0.0

    def wait_for_step(self, after: tuple[int, float] = (0, 0.0)) -> None:
        """Wait until two steps more have been recorded: what was on its way may be recorded after a kill."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        seen, times = after, 0
        while times < 2:
            assert self._driver is not None
            if self._driver.poll() is not None:
                raise RuntimeError(f"the run ended (rc {self._driver.returncode}):\n{self.log()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no step for {RECOVERY_SECONDS:g} s:\n{self.log()}")
            now = self.steps()
            if now != seen and now[0] > 0:
                seen, times = now, times + 1
            time.sleep(0.05)

    def log(self) -> str:
        return (self.directory / "driver.log").read_text(errors="replace")[-4000:]

    def _processes(self) -> list[psutil.Process]:
        roots = [psutil.Process()] if self._cluster is not None else []
        with suppress(psutil.NoSuchProcess):
            roots.append(psutil.Process(self._driver.pid))  # type: ignore[union-attr]
        found = {p.pid: p for root in roots for p in [root, *root.children(recursive=True)] if p.pid != os.getpid()}
        return list(found.values())

    # ------------------------------------------------------------------ exactly once

    def check(self) -> None:
        """Compare the journal with the data, after `stop`."""
        counted = trained(self.run)
        self.result.doubled = sum(n - 1 for n in counted.values() if n > 1)
        newest = max((self.run / "checkpoints").iterdir())
        state = json.loads((newest / "run.json").read_text())
        assert state["ledger"]["trained"] == counted.total(), (state["ledger"]["trained"], counted.total())
        config = load_config(self.config, [])
        source = PromptSource(data_options(config, config.data.train), config_adapter(config))
        handed_out: Counter[tuple[str, int]] = Counter()
        while source.state() != state["cursor"]:
            (prompt,) = source.take(1)
            handed_out[prompt.ref.uid, prompt.ref.epoch] += 1
        outstanding = [(entry["ref"]["uid"], entry["ref"]["epoch"]) for entry in state["ledger"]["outstanding"]]
        apart = [(uid, epoch) for uid, epoch, _ in state["ledger"]["quarantined"]]
        known = counted + Counter(outstanding) + Counter(apart)
        self.result.lost = (handed_out - known).total()
        assert not known - handed_out, "a prompt was trained that the data have not handed out"


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""
