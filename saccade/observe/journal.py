"""The journal of a run: `journal.jsonl`, to which is only ever appended.

    {"kind": "group", "state": "trained", "uid": ..., "epoch": 0, "step": 12, "detail": ""}    each end of a group
    {"kind": "fleet", "text": "rollout-1 was lost and is replaced: ..."}                        who came and went
    {"kind": "begin", "step": 10}                 from here on the run continues a checkpoint of step 10, or starts (0)

A checkpoint holds what a resume needs; the journal is the evidence. What was trained after the step at which the run
begins anew is void: its weights are gone, and its prompts are trained again. `trained` counts by that rule.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from learner.durable import StorageError, append, strict_json

JOURNAL = "journal.jsonl"


class Journal:
    """Entries wait in memory until `write`; where the disk is full, they wait longer."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL
        self._waiting: list[str] = []

    def add(self, kind: str, **known: Any) -> None:
        """Note what happened now."""
        self._waiting.append(strict_json({"kind": kind, "time": round(time.time(), 3), **known}) + "\n")

    def write(self) -> None:
        """Append what waits, if there is room."""
        with suppress(StorageError, OSError):
            append(self._path, "".join(self._waiting))
            self._waiting.clear()


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """All entries in their order. A last line that was cut off by the end of the process is left out."""
    entries = []
    for line in (directory / JOURNAL).read_text().splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def trained(directory: Path) -> Counter[tuple[str, int]]:
    """How often each prompt, by uid and epoch, went into the weights that the run has now."""
    found: dict[int, list[tuple[str, int]]] = {}
    for entry in read_journal(directory):
        if entry["kind"] == "begin":
            found = {step: prompts for step, prompts in found.items() if step <= entry["step"]}
        elif entry["kind"] == "group" and entry["state"] == "trained":
            found.setdefault(entry["step"], []).append((entry["uid"], entry["epoch"]))
    return Counter(prompt for prompts in found.values() for prompt in prompts)
