"""Checkpoints of a whole run: one folder a step, complete or absent.

    output_dir/checkpoints/step-000020/
        learner/     weights, optimizer, scheduler, RNG: independent of the number of ranks (learner/checkpoint.py)
        run.json     policy version, ledger (issued but untrained prompts), data cursor, resolved configuration

Written beside its place and renamed, so that a crash leaves the former checkpoint and nothing half-written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from driver.errors import RunError

FORMAT = 1


def save(directory: Path, step: int, state: Mapping[str, Any], save_learner: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of `step` under `directory`; `save_learner` fills the learner's folder. Returns its path."""
    final = directory / f"step-{step:06d}"
    partial = directory / f".writing-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_learner(partial / "learner")
    check_visible(partial / "learner")
    with (partial / "run.json").open("w") as file:
        json.dump({"format": FORMAT, "step": step, **state}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync_directory(directory)
    for old in sorted(found(directory))[:-keep]:
        shutil.rmtree(directory / f"step-{old:06d}")
    return final


def check_visible(written: Path) -> None:
    """Raises RunError when what the learner wrote is not there for the driver, which may run on another node."""
    if not written.exists():
        raise RunError(
            f"the learner wrote {written} on its own node, where the driver cannot see it; put output_dir on storage "
            "that all nodes share"
        )


def found(directory: Path) -> list[int]:
    """Steps of the complete checkpoints under `directory`."""
    if not directory.is_dir():
        return []
    matches = (re.fullmatch(r"step-(\d+)", p.name) for p in directory.iterdir())
    return sorted(int(m.group(1)) for m in matches if m)


def newest(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint and its run state. Raises RunError when there is none, or one of another format."""
    steps = found(directory)
    if not steps:
        raise RunError(f"nothing to resume: no checkpoint in {directory}; start without --resume")
    path = directory / f"step-{steps[-1]:06d}"
    state = json.loads((path / "run.json").read_text())
    if state.get("format") != FORMAT:
        raise RunError(f"{path} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return path, state


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
