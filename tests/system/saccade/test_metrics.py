"""Step statistics by hand, and that every exporter shows the same numbers."""

from __future__ import annotations

import json
import os
import resource
import urllib.request
from dataclasses import replace
from math import inf, nan

import pytest

from saccade.observe.metrics import MetricsLog, StepRecord, read_metrics
from tests.unit.saccade.test_metrics import no_json

EXPECTED = {"step": 4.0, "steps": 9.0, "samples_per_second": 2.0, "kl": 0.01, "loss": 0.1, "learning_rate": 0.001}
EXPECTED |= {"truncated_share": 0.25, "groups_without_signal": 1.0, "invalid_share": 0.25, "driver_seconds": 0.25}
"""Gauges of `record(4)`."""


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        reward=0.5,
        parts={"accuracy": 0.25},
        groups=2,
        groups_without_signal=1,
        steps_not_taken=0,
        samples=4,
        tokens=14,
        invalid={"timeout": 1},
        dropped=0,
        replaced=0,
        issued_again=0,
        truncated_share=0.25,
        completion_length=3.5,
        staleness=1,
        loss=0.1,
        grad_norm=2.0,
        learning_rate=1e-3,
        learner={"kl": 0.01, "entropy": 1.5, "mismatch_mean": 1e-6, "mismatch_max": 1e-5},
        seconds={"rollout": 0.5, "learn": 1.0, "sync": 0.25, "driver": 0.25, "total": 2.0},
        busy={},
        reward_seconds={"accuracy": 0.75},
    )


def test_the_prometheus_endpoint_and_the_log_agree_and_a_resume_rewrites(local_ray, tmp_path, unused_port):
    log = MetricsLog(tmp_path, unused_port, steps=9)
    for step in (1, 2):
        log.step(record(step))
    log.step(replace(record(3), loss=nan, grad_norm=inf, learner={"kl": nan}, steps_not_taken=1))
    written = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=no_json)
    assert (written["loss"], written["grad_norm"], written["learner"]) == (None, None, {"kl": None})
    log.step(record(4))
    log.evaluation(4, {"unseen": {"all": {"reward": 0.5, "n": 8.0}}}, 1.0)
    text = urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/metrics", timeout=10).read().decode()
    run = f'run="{tmp_path.name}"'
    for name, value in EXPECTED.items():
        assert f"saccade_{name}{{{run}}} {value}\n" in text
    assert f'saccade_reward_seconds{{reward="accuracy",{run}}} 0.75' in text
    assert f'saccade_reward_score{{reward="accuracy",{run}}} 0.25' in text
    assert f'saccade_evaluation{{figure="reward",file="unseen",group="all",{run}}} 0.5' in text
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a run killed while writing
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert log.truncate_after(1) == 1
    log.step(record(2))
    log.flush()
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path)[0]["seconds"]["learn"] == 1.0
    log.close()
    MetricsLog(tmp_path, unused_port).close()  # the next run of this process


def test_figures_that_find_no_room_wait_and_are_written_whole_and_in_order(local_ray, tmp_path):
    """A limit on the size of files is a real error of the system, like a full disk."""
    said: list[str] = []
    log = MetricsLog(tmp_path, report=said.append)
    log.step(record(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, former[1]))
    try:
        log.step(record(2))
        log.evaluation(2, {}, 1.0)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        log.flush()  # as before every checkpoint, which is saved all the same
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    log.step(record(3))
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2, 3]
    assert [e["step"] for e in read_metrics(tmp_path, "evaluation")] == [2]
    assert len(said) == 2 and "metrics.jsonl cannot be written: File too large" in said[0]
    assert "the run continues" in said[0] and "2 waiting records" in said[1]


def test_figures_are_made_to_last_before_a_checkpoint_and_not_each_by_itself(local_ray, tmp_path, monkeypatch):
    synced: list[str] = []
    log = MetricsLog(tmp_path)
    log.flush()  # a run that is stopped before its first step
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    log.step(record(1))
    assert synced == []
    log.flush()
    assert synced == [str(tmp_path / "metrics.jsonl"), str(tmp_path)]


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
