"""Write one record per step to `metrics.jsonl`, and export its numbers as gauges.

StepRecord ─▶ metrics.jsonl   (everything; reports read it; null where a number is not finite)
           ─▶ saccade/observe/gauges.py (for Ray's metrics and Prometheus)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from learner.durable import StorageError, append, atomic_file, strict_json, sync_file
from learner.types import UpdateStats
from rollout.types import GroupSummary
from saccade.observe.gauges import GAUGES, Gauges
from saccade.observe.timing import union_seconds
from weight_sync.protocols import SyncTimes

MODEL = "model"
"""The `kind` of the record that says that the model is saved."""


@dataclass(frozen=True)
class StepRecord:
    """The figures of one optimizer step. `seconds` are wall time in the driver; `busy` are seconds that the actors
    measured."""

    step: int
    """Policy version after the step."""
    reward: float
    parts: Mapping[str, float]
    """Mean score by reward name."""
    groups: int
    groups_without_signal: int
    """Groups whose rewards are all equal, or with fewer than two scores. They do not change the policy."""
    steps_not_taken: int
    """Optimizer steps of the update that were not taken because the loss or gradient was not finite. The learner's
    figures are those of the other steps, if there are any."""
    samples: int
    tokens: int
    """Completion tokens."""
    invalid: Mapping[str, int]
    """Completions without a score, by reason."""
    dropped: int
    """Groups that were given up since the step before, and whose prompts are not trained in this epoch."""
    replaced: int
    """Groups without a learning signal that others replaced (algorithm.refill)."""
    issued_again: int
    """Groups that were overtaken until they were too old; their prompts were issued again."""
    truncated_share: float
    """Share of completions cut off at max_completion_length."""
    completion_length: float
    staleness: int
    loss: float
    grad_norm: float
    learning_rate: float
    learner: Mapping[str, float]
    """Means over trained tokens: kl, entropy, clip fraction, mismatch between engine and learner, ..."""
    seconds: Mapping[str, float]
    """Seconds by phase: rollout (waiting for groups), learn, sync, driver (the rest), total."""
    busy: Mapping[str, float]
    """Seconds of work per kind of actor: generate (union over groups, per engine), reward (sum over calls), the
    learner's phases, and of the weight sync: pause (all that generation lost), gather, transfer, load, verify."""
    reward_seconds: Mapping[str, float] = field(default_factory=dict)
    """Mean seconds per group, by reward name."""

    @classmethod
    def of(
        cls,
        step: int,
        summaries: Sequence[GroupSummary],
        update: UpdateStats,
        *,
        left_out: Sequence[GroupSummary] = (),
        dropped: int,
        replaced: int,
        issued_again: int = 0,
        staleness: int,
        seconds: Mapping[str, float],
        sync: SyncTimes | None = None,
    ) -> StepRecord:
        """The record of an update on these groups; others were scored for it and `left_out`."""
        return cls(
            step=step,
            **group_statistics(summaries, left_out),
            groups_without_signal=update.groups_dropped + update.groups_flat,
            steps_not_taken=len(update.refused),
            dropped=dropped,
            replaced=replaced,
            issued_again=issued_again,
            staleness=staleness,
            loss=update.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            learner=dict(update.metrics),
            seconds=dict(seconds),
            busy=_busy(summaries, update) | ({f"sync/{name}": t for name, t in asdict(sync).items()} if sync else {}),
        )


def _busy(summaries: Sequence[GroupSummary], update: UpdateStats) -> dict[str, float]:
    """Seconds of work: each engine's with a group of the batch in it, the rewards' calls, the learner's phases."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for s in summaries:
        spans.setdefault(s.engine, []).append((s.generate_started, s.generate_started + s.generate_seconds))
    busy = {f"generate/{engine}": union_seconds(times) for engine, times in sorted(spans.items())}
    busy["reward"] = sum(s.reward_seconds for s in summaries)
    return busy | {f"learn/{name}": value for name, value in update.seconds.items()}


def group_statistics(summaries: Sequence[GroupSummary], left_out: Sequence[GroupSummary] = ()) -> dict[str, Any]:
    """Compute the counts and means of one step. `parts` are means over scored completions only. `invalid` counts those
    of groups that were `left_out` too."""
    rewards = [r for s in summaries for r, ok in zip(s.rewards, s.valid, strict=True) if ok]
    lengths = [n for s in summaries for n in s.lengths]
    reasons = [r for s in summaries for r in s.finish_reasons]
    names = sorted({name for s in summaries for name in s.parts})
    parts = {name: float(np.mean([v for s in summaries for v in s.parts.get(name, ())])) for name in names}
    timed = sorted({name for s in summaries for name in s.part_seconds})
    latency = {n: float(np.mean([s.part_seconds[n] for s in summaries if n in s.part_seconds])) for n in timed}
    invalid: dict[str, int] = {}
    for summary in (*summaries, *left_out):
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
    """Writes records and sets the gauges.

    If the file cannot be written (a full disk), records wait in memory and are written later."""

    directory: Path
    port: int = 0
    report: Callable[[str], None] = lambda text: None
    """Called with a message when records begin to wait, and when they are written."""
    steps: int = 0
    """How many steps the run will do."""
    _waiting: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gauges = Gauges(self.directory.name, self.port)
        self.directory.mkdir(parents=True, exist_ok=True)

    def step(self, record: StepRecord) -> None:
        """Append the record and set every gauge."""
        self._write({"kind": "step", **asdict(record)})
        total = record.seconds["total"]
        known = {**asdict(record), **record.learner}
        values = {
            **{name: known[name] for name in GAUGES if name in known},
            **{f"{name}_seconds": record.seconds[name] for name in ("rollout", "learn", "sync", "driver")},
            "steps": self.steps,
            "samples_per_second": record.samples / total,
            "tokens_per_second": record.tokens / total,
            "invalid_share": sum(record.invalid.values()) / max(1, record.samples),
        }
        for name, value in values.items():
            self._gauges.set(name, value)
        for name, value in record.parts.items():
            self._gauges.set("reward_score", value, reward=name)
        for name, value in record.reward_seconds.items():
            self._gauges.set("reward_seconds", value, reward=name)

    def evaluation(self, step: int, results: Mapping[str, Any], seconds: float) -> None:
        """Append one evaluation."""
        self._write({"kind": "evaluation", "step": step, "seconds": seconds, "results": results})
        for file, groups in results.items():
            for group, figures in groups.items():
                for name, value in figures.items():
                    self._gauges.set("evaluation", value, file=file, group=group, figure=name)

    def model(self, step: int) -> None:
        """Append a record that says that the model of `step` is saved."""
        self._write({"kind": MODEL, "step": step})

    def truncate_after(self, step: int) -> int:
        """Drop the records of steps after `step`; the resumed run writes them again. Also drops unreadable lines, and
        returns how many there were."""
        path = self.directory / "metrics.jsonl"
        entries, unreadable = _read(path)
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        atomic_file(path, "".join(strict_json(entry) + "\n" for entry in entries if entry["step"] <= step))
        return unreadable

    def close(self) -> None:
        """Release the port, and report records that could not be written."""
        with suppress(OSError):  # this must not hide how the run ended
            self._write_waiting(len(self._waiting))
        if self._waiting:
            self.report(f"metrics.jsonl: {len(self._waiting)} waiting records could not be written and are lost")
        self._gauges.close()

    def flush(self) -> None:
        """Write the waiting records, if possible, and sync the file to disk. A run that resumes from the following
        checkpoint does not write these records again, so they must survive a power failure."""
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
                self.report(f"{error}; the run continues and writes these records later")
        else:
            self._waiting.clear()
            if waited:
                self.report(f"metrics.jsonl: {waited} waiting records are now written")


def read_metrics(directory: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Read the records of one kind (`step`, `evaluation`, `model`) from `metrics.jsonl`. Lines that a kill cut off are
    left out."""
    return [entry for entry in _read(directory / "metrics.jsonl")[0] if entry["kind"] == kind]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records and the number of unreadable lines."""
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
