"""What is said of a data set: rows refused and truncated, and how it differs from that of a saved cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WHAT_TO_DO = (
    "Resume with the data that the run began with, or start a run on these in another output_dir, with the weights of "
    "a checkpoint of this one (saccade merge) as model.path"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row that was not used, and why."""

    file: str
    row: int
    kind: str
    """A few fixed words, to count by."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}"


@dataclass(frozen=True)
class DataReport:
    """What a source has seen since it was made. A row that comes up in several epochs counts once."""

    rows: int
    """Rows of the data set, over all files."""
    seen: int
    refused: Mapping[str, int] = field(default_factory=dict)
    """Refused rows by kind."""
    first_refusals: tuple[Refusal, ...] = ()
    truncated: int = 0
    """Rows whose user's text was shortened to fit."""

    @property
    def refused_total(self) -> int:
        return sum(self.refused.values())

    @property
    def remark(self) -> str:
        """What a user should know of it, in one line: nothing where all rows were used as they are."""
        first = f"; the first: {self.first_refusals[0]}" if self.first_refusals else ""
        return f"{self}{first}" if self.refused or self.truncated else ""

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.refused.items(), key=lambda item: -item[1]))
        refused = f"{self.refused_total} of {self.seen} rows refused" + (f": {kinds}" if kinds else "")
        return refused + (f"; {self.truncated} truncated" if self.truncated else "")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, how the identity of a data set, and of the order of its rows, differs from a saved one."""
    found = []
    if then.get("files") != now["files"]:
        found.append(f"files: {_files(then.get('files', []))} then, {_files(now['files'])} now")
    for key, knob in (("seed", "seed"), ("shuffle", "data.shuffle")):
        if then.get(key) != now[key]:
            found.append(f"{knob}: {then.get(key)} then, {now[key]} now")
    if not found and then.get("order") != now["order"]:
        found.append("order of the rows: other columns are read, or the same files were written anew in other parts")
    return found


def _files(files: Sequence[tuple[str, int]]) -> str:
    shown = [f"{name} with {rows:,} rows" for name, rows in files[:5]]
    return ", ".join(shown) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
