"""Progress of a run: a live line with a bar on a terminal, and one line per step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from saccade.observe.metrics import StepRecord
from saccade.observe.screen import say


class Display(Protocol):
    """Receives the events of a run and prints them in its own way."""

    def phase(self, text: str) -> None:
        """A phase outside the steps began (starting engines, evaluating, saving)."""

    def step(self, record: StepRecord, total: int) -> None: ...

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def describe(record: StepRecord) -> str:
    """Return the most important numbers of a step in one line."""
    seconds = record.seconds
    parts = " ".join(f"{name} {value:.2f}" for name, value in record.parts.items())
    shown = [f"reward {record.reward:.3f}", parts, f"length {record.completion_length:.1f}"]
    shown += [f"{label} {record.learner[key]:.3f}" for label, key in (("kl", "kl"),) if key in record.learner]
    shown.append(f"{record.samples / seconds['total']:.0f} samples/s")
    timing = " ".join(f"{name} {seconds[name]:.2f}" for name in ("rollout", "learn", "sync"))
    lost = sum(record.invalid.values())
    shown.append(f"({timing} s)")
    if lost or record.dropped:
        shown.append(f"[{lost} completions without a score, {record.dropped} groups dropped]")
    return "  ".join(shown)


class SilentDisplay:
    """Prints nothing; for use as a library."""

    def phase(self, text: str) -> None: ...

    def step(self, record: StepRecord, total: int) -> None: ...

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class TerminalDisplay:
    """Shows a progress bar on a terminal and prints plain lines to a file."""

    console: Console

    def __post_init__(self) -> None:
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("step"),
            # A narrow terminal cuts the numbers at the end, not the count.
            MofNCompleteColumn(table_column=Column(min_width=9)),
            BarColumn(bar_width=20, table_column=Column(min_width=8)),
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            console=self.console,
            transient=True,
            expand=True,
        )

    def phase(self, text: str) -> None:
        say(self.console, text, style="dim")

    def step(self, record: StepRecord, total: int) -> None:
        line = describe(record)
        if not self.console.is_terminal:
            say(self.console, f"step {record.step}/{total}  {line}")
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=total, completed=record.step - 1)
        self._progress.update(self._task, completed=record.step, description=line)

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        for file, groups in results.items():
            cells = "  ".join(
                f"{group} " + " ".join(f"{k} {v:.3f}" for k, v in means.items() if k not in ("n", "failed", "reward"))
                for group, means in groups.items()
            )
            say(self.console, f"step {step}  evaluation of {file}: {cells}")

    def close(self) -> None:
        if self._task is not None:
            self._progress.stop()
            self._task = None
