"""Checkpoints of a whole run: one folder a step, complete or absent.

    output_dir/checkpoints/step-000020/
        learner/     weights, optimizer, steps, RNG; any number of ranks can load it (learner/engines/checkpoint.py)
        run.json     policy version, ledger (issued but untrained prompts), data cursor, resolved configuration, ...
        digests.json size and SHA-256 of every file

`learner/durable.py` writes it beside its place and renames it, so that a crash leaves the former checkpoint and nothing
half-written. A resume checks every file and takes the newest checkpoint that is not damaged.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from learner.durable import atomic_directory, damage, remove_directory, strict_json
from saccade.errors import RunError

FORMAT = 5


class DamagedError(RunError):
    """A checkpoint has a file that is missing, cut, changed, or in another format."""


def save(directory: Path, step: int, state: Mapping[str, Any], save_learner: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of `step` under `directory`; `save_learner` fills the learner's folder. Returns its path.

    Raises StorageError if there is no room; the former checkpoints are then unchanged."""
    final = _path(directory, step)
    with atomic_directory(final, sealed=True) as partial:
        save_learner(partial / "learner")
        check_visible(partial / "learner")
        (partial / "run.json").write_text(strict_json({"format": FORMAT, "step": step, **state}, 1))
    # Later steps than this one belong to checkpoints that a resume found damaged: they count for nothing.
    before = [s for s in found(directory) if s < step]
    for old in before[: max(0, len(before) + 1 - keep)]:
        remove_directory(_path(directory, old))
    return final


def check_visible(written: Path) -> None:
    """Raises RunError if the driver, which may run on another node, cannot see what the learner wrote."""
    if not written.exists():
        raise RunError(
            f"the learner wrote {written} on its own node, where the driver cannot see it; put output_dir on storage "
            "that all nodes share"
        )


def found(directory: Path) -> list[int]:
    """Steps of the complete checkpoints under `directory`."""
    if not os.path.isdir(directory):  # also False where reading is not allowed
        return []
    matches = (re.fullmatch(r"step-(\d+)", p.name) for p in directory.iterdir())
    return sorted(int(m.group(1)) for m in matches if m)


def newest(directory: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest undamaged checkpoint and its run state. `say` is told which newer ones are damaged, and how.

    Raises RunError if there is none."""
    steps = found(directory)
    if not steps:
        raise RunError(f"nothing to resume: no checkpoint in {directory}; start without --resume")
    problems = []
    for step in reversed(steps):
        path = _path(directory, step)
        try:
            return path, read_state(path)
        except DamagedError as error:
            problems.append(str(error))
            say(f"{error}; trying the checkpoint before it")
    raise RunError(f"nothing to resume: no checkpoint in {directory} is usable: " + "; ".join(problems))


def read_state(path: Path) -> dict[str, Any]:
    """The run state of a checkpoint, after all of its files have been checked. Raises DamagedError, or RunError for a
    checkpoint of another version of saccade."""
    try:
        state: dict[str, Any] = json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"checkpoint {path} is damaged: run.json cannot be read ({error})") from error
    other = state.get("format") if isinstance(state, dict) else None
    if isinstance(other, int) and other != FORMAT:
        raise RunError(
            f"{path} has checkpoint format {other}, and this version of saccade reads {FORMAT}: continue with the "
            "version that wrote it, or start a new run from its model"
        )
    if other != FORMAT:
        raise DamagedError(f"checkpoint {path} is damaged: run.json names no format")
    if text := damage(path):
        raise DamagedError(f"checkpoint {path} is damaged: {text}")
    return state


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def changed_knobs(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Knobs that differ between two dumped configurations, one text each."""
    found = []
    for name, value in now.items():
        before = then.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            found += changed_knobs(before, value, f"{prefix}{name}.")
        elif before != value:
            found.append(f"{prefix}{name} {before!r} -> {value!r}")
    return found
