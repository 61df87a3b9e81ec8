"""One record per step, written to `metrics.jsonl`, to Ray's metrics and, if wanted, to a Prometheus endpoint.

StepRecord ─▶ metrics.jsonl        (everything; what reports are made from; null where a number is not finite)
           ─▶ ray.util.metrics     (gauges `ray_saccade_*` on every node's metrics port)
           ─▶ prometheus_client    (gauges `saccade_*` on the driver, if cluster.metrics_port is set)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client import Gauge as PrometheusGauge
from ray.util.metrics import Gauge as RayGauge

from learner.durable import StorageError, append, atomic_file, strict_json, sync_file
from rollout.types import GroupSummary

GAUGES = {
    "reward": "mean reward of the step's scored completions",
    "samples_per_second": "completions trained per second of wall time",
    "tokens_per_second": "completion tokens trained per second of wall time",
    "rollout_seconds": "seconds the driver waited for the step's groups",
    "learn_seconds": "seconds of the learner's update",
    "sync_seconds": "seconds from pause to resume of the weight synchronisation",
    "driver_seconds": "seconds of the step in which nothing but the driver worked",
    "staleness": "largest lag in policy versions of a trained token",
    "kl": "mean KL to the reference policy, as estimated",
    "mismatch_mean": "mean |log-probability difference| between engine and learner",
    "mismatch_max": "largest |log-probability difference| between engine and learner",
    "mismatch_kl": "mean k3 KL of the engine's policy to the learner's",
    "effective_sample_size": "of the importance weights between engine and learner, as a share of the tokens",
    "invalid_share": "share of completions without a score",
    "completion_length": "mean completion length in tokens",
    "grad_norm": "gradient norm before clipping",
    "steps_not_taken": "optimizer steps of the last update that were not taken, as the gradient was not finite",
    "entropy": "mean token entropy",
}
MODEL = "model"
"""Kind of the record of a saved model."""
REWARD_SECONDS = "reward_seconds", "mean seconds that a reward took for one group"
"""A gauge with a label: the name of the reward."""


@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step. Seconds are wall time in the driver; busy seconds are the actors' own."""

    step: int
    version: int
    """Policy version after the step."""
    reward: float
    parts: Mapping[str, float]
    """Mean score by reward name."""
    groups: int
    groups_without_signal: int
    """Groups of no variance or fewer than two valid completions: they contribute nothing."""
    steps_not_taken: int
    """Optimizer steps of the update that were not taken, as the loss or gradient was not finite; the learner's figures
    are of the others, if there is one."""
    samples: int
    tokens: int
    """Completion tokens."""
    invalid: Mapping[str, int]
    """Completions without a score, by reason."""
    dropped: int
    """Groups given up in this step."""
    replaced: int
    """Groups without a policy gradient in whose place others were generated (algorithm.refill)."""
    truncated_share: float
    """Completions cut off at max_completion_length."""
    completion_length: float
    staleness: int
    loss: float
    grad_norm: float
    learning_rate: float
    learner: Mapping[str, float]
    """Means over trained tokens: kl, entropy, clip fraction, mismatch between engine and learner, ..."""
    seconds: Mapping[str, float]
    """rollout (waiting for groups), learn, sync, driver (the rest), total."""
    busy: Mapping[str, float]
    """Seconds of work per kind of actor: generate (union over groups, per engine), reward (sum over calls)."""
    reward_seconds: Mapping[str, float] = field(default_factory=dict)
    """Latency: mean seconds per group by reward name."""


def group_statistics(summaries: Sequence[GroupSummary]) -> dict[str, Any]:
    """Counts and means over the groups of one step; `parts` averages over scored completions only."""
    rewards = [r for s in summaries for r, ok in zip(s.rewards, s.valid, strict=True) if ok]
    lengths = [n for s in summaries for n in s.lengths]
    reasons = [r for s in summaries for r in s.finish_reasons]
    names = sorted({name for s in summaries for name in s.parts})
    parts = {name: float(np.mean([v for s in summaries for v in s.parts.get(name, ())])) for name in names}
    timed = sorted({name for s in summaries for name in s.part_seconds})
    latency = {n: float(np.mean([s.part_seconds[n] for s in summaries if n in s.part_seconds])) for n in timed}
    invalid: dict[str, int] = {}
    for summary in summaries:
        for reason in summary.invalid_reasons:
            invalid[reason] = invalid.get(reason, 0) + 1
    return {
        "reward": float(np.mean(rewards)) if rewards else float("nan"),
        "parts": parts,
        "reward_seconds": latency,
        "groups": len(summaries),
        "samples": len(lengths),
        "tokens": sum(lengths),
        "invalid": invalid,
        "truncated_share": reasons.count("length") / len(reasons) if reasons else 0.0,
        "completion_length": float(np.mean(lengths)) if lengths else 0.0,
    }


@dataclass
class MetricsLog:
    """Writes records; every exporter sees the same numbers.

    Where the file cannot be written to (a full disk), records wait here and follow when it can be."""

    directory: Path
    port: int = 0
    report: Callable[[str], None] = lambda text: None
    """Told when records begin to wait, and when they are written."""
    _waiting: list[str] = field(default_factory=list)
    _gauges: dict[str, tuple[RayGauge, PrometheusGauge]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        registry = CollectorRegistry()
        for name, description in GAUGES.items():
            ray_gauge = RayGauge(f"saccade_{name}", description=description)
            self._gauges[name] = (ray_gauge, PrometheusGauge(f"saccade_{name}", description, registry=registry))
        self._latency = (
            RayGauge(f"saccade_{REWARD_SECONDS[0]}", description=REWARD_SECONDS[1], tag_keys=("reward",)),
            PrometheusGauge(f"saccade_{REWARD_SECONDS[0]}", REWARD_SECONDS[1], ["reward"], registry=registry),
        )
        self._server = start_http_server(self.port, registry=registry)[0] if self.port else None
        self.directory.mkdir(parents=True, exist_ok=True)

    def step(self, record: StepRecord) -> None:
        """Append the record and set every gauge."""
        self._write({"kind": "step", **asdict(record)})
        total = record.seconds["total"]
        values = {
            "reward": record.reward,
            "samples_per_second": record.samples / total,
            "tokens_per_second": record.tokens / total,
            "rollout_seconds": record.seconds["rollout"],
            "learn_seconds": record.seconds["learn"],
            "sync_seconds": record.seconds["sync"],
            "driver_seconds": record.seconds["driver"],
            "staleness": record.staleness,
            "invalid_share": sum(record.invalid.values()) / max(1, record.samples),
            "completion_length": record.completion_length,
            "grad_norm": record.grad_norm,
            "steps_not_taken": record.steps_not_taken,
            **{k: v for k, v in record.learner.items() if k in GAUGES},
        }
        for name, value in values.items():
            ray_gauge, prometheus_gauge = self._gauges[name]
            ray_gauge.set(float(value))
            prometheus_gauge.set(float(value))
        ray_latency, prometheus_latency = self._latency
        for name, value in record.reward_seconds.items():
            ray_latency.set(value, tags={"reward": name})
            prometheus_latency.labels(name).set(value)

    def evaluation(self, step: int, results: Mapping[str, Any], seconds: float) -> None:
        """Append one evaluation."""
        self._write({"kind": "evaluation", "step": step, "seconds": seconds, "results": results})

    def model(self, step: int) -> None:
        """Append that the model of `step` is saved."""
        self._write({"kind": MODEL, "step": step})

    def truncate_after(self, step: int) -> int:
        """Forget records of steps later than `step`: a resumed run writes them again. Returns how many lines could not
        be read, which go too."""
        path = self.directory / "metrics.jsonl"
        entries, unreadable = _read(path)
        atomic_file(path, "".join(strict_json(entry) + "\n" for entry in entries if entry["step"] <= step))
        return unreadable

    def close(self) -> None:
        """Give the port back; say what could not be written to the end."""
        with suppress(OSError):  # no reason to hide how the run ended
            self._write_waiting(len(self._waiting))
        if self._waiting:
            self.report(f"metrics.jsonl: {len(self._waiting)} records that waited could not be written, and are lost")
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def flush(self) -> None:
        """Write what waits, if it can be written, and make all of it survive a power failure: a run that goes on from
        the checkpoint that follows does not write it again."""
        self._write_waiting(len(self._waiting))
        with suppress(StorageError, FileNotFoundError):
            sync_file(self.directory / "metrics.jsonl")

    def _write(self, entry: Mapping[str, Any]) -> None:
        waited = len(self._waiting)
        self._waiting.append(strict_json(entry) + "\n")
        self._write_waiting(waited)

    def _write_waiting(self, waited: int) -> None:
        if not self._waiting:
            return
        try:
            append(self.directory / "metrics.jsonl", "".join(self._waiting))
        except StorageError as error:
            if not waited:
                self.report(f"{error}; the run goes on, and its figures are written when they can be")
        else:
            self._waiting.clear()
            if waited:
                self.report(f"metrics.jsonl: {waited} records that had waited are written")


def read_metrics(directory: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Records of one kind (`step`, `evaluation`, `model`) of `metrics.jsonl`; without lines that a kill cut off."""
    return [entry for entry in _read(directory / "metrics.jsonl")[0] if entry["kind"] == kind]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records, and the number of lines that are none."""
    entries: list[dict[str, Any]] = []
    unreadable = 0
    if not path.exists():
        return entries, unreadable
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and "kind" in entry and "step" in entry:
            entries.append(entry)
        else:
            unreadable += 1
    return entries, unreadable
