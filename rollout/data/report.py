"""Report on a data set: refused and truncated rows, and differences from the data set of a saved cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WHAT_TO_DO = (
    "Resume with the data that the run began with. To train on the new data, start a run in another output_dir, "
    "with a merged checkpoint of this run (saccade merge) as model.path"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that was not used, and the reason."""

    file: str
    row: int
    kind: str
    """A short fixed phrase; refusals are counted by it."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}"


@dataclass(frozen=True)
class DataReport:
    """Everything a source has seen since it was made. A row that comes up in several epochs counts once."""

    rows: int
    """Rows of the data set, over all files."""
    seen: int
    refused: Mapping[str, int] = field(default_factory=dict)
    """Refused rows by kind."""
    first_refusals: tuple[Refusal, ...] = ()
    truncated: int = 0
    """Rows whose user text was shortened to fit."""

    @property
    def refused_total(self) -> int:
        return sum(self.refused.values())

    @property
    def remark(self) -> str:
        """Return one line for the user; empty if all rows were used unchanged."""
        first = f"; the first: {self.first_refusals[0]}" if self.first_refusals else ""
        return f"{self}{first}" if self.refused or self.truncated else ""

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.refused.items(), key=lambda item: -item[1]))
        refused = f"{self.refused_total} of {self.seen} rows refused" + (f": {kinds}" if kinds else "")
        return refused + (f"; {self.truncated} truncated" if self.truncated else "")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe how the identity of a data set, and of the order of its rows, differs from a saved one."""
    found = []
    if then.get("files") != now["files"]:
        found.append(f"files: they were {_files(then.get('files', []))}, now {_files(now['files'])}")
    elif then.get("contents") != now["contents"]:
        marks = zip(now["files"], then.get("contents", []), now["contents"], strict=False)
        changed = [name for (name, _), before, after in marks if before != after]
        found.append(f"contents: {', '.join(changed[:5])} changed since, with as many rows as before")
    for key, knob in (("seed", "seed"), ("shuffle", "data.shuffle")):
        if then.get(key) != now[key]:
            found.append(f"{knob}: it was {then.get(key)}, now {now[key]}")
    if not found and then.get("order") != now["order"]:
        found.append(
            "order of the rows: other columns are read, or the same files were rewritten with other row groups"
        )
    return found


def _files(files: Sequence[tuple[str, int]]) -> str:
    shown = [f"{name} with {rows:,} rows" for name, rows in files[:5]]
    return ", ".join(shown) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
