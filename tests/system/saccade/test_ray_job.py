"""A submitted job on a cluster of several nodes: two engines, two ranks and two rewards, rollouts ahead of training;
metrics on the nodes' ports, a clean stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from saccade.demo.shapes import make_shapes
from saccade.observe.metrics import read_metrics

DEADLINE = 600.0
START_CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
# Ports of their own: the defaults may be another Ray's on this machine.
dashboard, *agents = map(int, sys.argv[1:])
head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": dashboard}
cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": agents.pop()})
for resources in ({"rollout_node": 2, "reward_node": 2}, {"learner_node": 2}):
    cluster.add_node(num_cpus=8, resources=resources, dashboard_agent_listen_port=agents.pop())
cluster.wait_for_nodes()
node = cluster.head_node
print(json.dumps({"dashboard": node.webui_url, "session": node.get_session_dir_path()}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """Three nodes on this machine, in a process of their own; ended when its standard input closes."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_metrics_report_interval_ms": "1000",
    }
    with subprocess.Popen(
        [sys.executable, "-c", START_CLUSTER, *map(str, unused_ports(4))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            lines = (line for line in process.stdout if line.startswith("{"))
            yield json.loads(next(lines))
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def unused_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def test_a_submitted_job_overlaps_across_nodes_reports_metrics_and_stops_with_a_checkpoint(
    cluster, tiny_model, repository, tmp_path
):
    """Rollouts are one batch of weights ahead, and never two; DAPO in two steps, corrected, with an entropy bonus."""
    make_shapes(tmp_path / "data", seed=0, train_rounds=1, unseen_rounds=1)
    config = {
        "output_dir": str(tmp_path / "run"),
        "steps": 100_000,
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"train": [str(tmp_path / "data/train.parquet")], "max_prompt_length": 256},
        "rollout": {
            "num_generations": 4,
            "max_completion_length": 8,
            "max_staleness": 1,
            "engines": 2,
            "kv_cache_gib": 0.25,
            "engine_options": {"max_num_seqs": 32},
        },
        "reward": {
            "functions": [{"name": f"{repository}/tests/helpers/rewards_for_tests.py:letters"}],
            "actors": 2,
        },
        "algorithm": {"name": "dapo", "kl": 0.1, "off_policy": "tis", "optimizer_steps": 2, "entropy_bonus": 0.001},
        "learner": {"prompts_per_step": 4, "learning_rate": 1e-3, "zero_stage": 3, "ranks": 2},
        "checkpoint": {"every": 0},
        "cluster": {
            "device": "cpu",
            "resources": {role: {f"{role}_node": 1} for role in ("rollout", "learner", "reward")},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    jobs = Jobs(f"http://{cluster['dashboard']}", repository)
    jobs.submit("python", "-m", "saccade", "train", str(path))

    def sample() -> dict[str, float]:
        assert jobs.status() in ("PENDING", "RUNNING"), jobs.logs()
        return scrape(Path(cluster["session"]))

    metrics = wait_until(lambda: (m := sample()).get("ray_saccade_step", 0) >= 4 and m, "metrics", jobs.logs)
    assert metrics["ray_saccade_samples_per_second"] > 0
    assert metrics["ray_saccade_staleness"] in (0, 1)
    listed = json.loads(urllib.request.urlopen(f"http://{cluster['dashboard']}/logical/actors", timeout=30).read())
    alive = {actor["reprName"] for actor in listed["data"]["actors"].values() if actor["state"] == "ALIVE"}
    assert alive >= {"data", *(f"{role}-{i}" for role in ("rollout", "learner", "reward") for i in (0, 1))}

    jobs.stop()
    wait_until(lambda: jobs.status() == "STOPPED", "the job to stop", jobs.logs)
    saved = list((tmp_path / "run/checkpoints").glob("step-*/run.json"))
    assert len(saved) == 1, jobs.logs()
    steps = read_metrics(tmp_path / "run")
    assert {s["staleness"] for s in steps} == {0, 1} and steps[0]["staleness"] == 0
    assert all(0 < s["learner"]["effective_sample_size"] <= 1 + 1e-5 for s in steps)
    older = [s["learner"]["mismatch_max"] for s in steps if s["staleness"] > 0]  # older weights sampled
    assert steps[0]["learner"]["mismatch_max"] < 1e-4 < max(older)
    generated = {k for s in steps for k in s["busy"] if k.startswith("generate/")}
    assert generated == {"generate/rollout-0", "generate/rollout-1"}


class Jobs:
    """The `ray job` command line against one cluster."""

    def __init__(self, address: str, repository: Path) -> None:
        self._ray = [str(Path(sys.executable).parent / "ray"), "job"]
        self._environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": address}
        self._repository = repository
        self._client = JobSubmissionClient(address)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self._ray, *arguments]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(command, cwd=self._repository, env=self._environment, check=False, **options)

    def _call(self, *arguments: str) -> str:
        done = self._run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *entrypoint: str) -> None:
        """`ray job submit --working-dir .`, as soon as a node's agent is there to take it."""
        refused: list[str] = []

        def accepted() -> bool:
            done = self._run(
                "submit",
                "--working-dir",
                ".",
                "--no-wait",
                "--submission-id",
                "saccade",
                "--runtime-env-json",
                json.dumps({"env_vars": {"HF_HUB_OFFLINE": "1", "RAY_JOB_STOP_WAIT_TIME_S": "600"}}),
                "--",
                *entrypoint,
            )
            refused.append(done.stderr)
            return done.returncode == 0

        wait_until(accepted, "the job to be accepted", lambda: refused[-1])

    def status(self) -> str:
        """Asked without the command line, whose start would take more of the machine than the run."""
        return str(self._client.get_job_status("saccade").value)

    def logs(self) -> str:
        return self._client.get_job_logs("saccade")

    def stop(self) -> None:
        self._call("stop", "saccade")


def scrape(session: Path) -> dict[str, float]:
    """All gauges of this project on the metrics ports of all nodes."""
    found: dict[str, float] = {}
    discovery = session / "prom_metrics_service_discovery.json"
    targets = json.loads(discovery.read_text()) if discovery.exists() else []
    for target in {t for entry in targets for t in entry["targets"]}:
        try:
            text = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
        except OSError:
            continue  # a node's agent that is still starting
        for line in text.splitlines():
            if line.startswith("ray_saccade_"):
                found[line.split("{")[0]] = float(line.rsplit(" ", 1)[1])
    return found


def wait_until(condition: Callable, what: str, explain: Callable[[], str]):
    """Poll until `condition` holds; after DEADLINE fail with the job's log."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(1.0)
    pytest.fail(f"waited {DEADLINE:g} s for {what}:\n{explain()}")
