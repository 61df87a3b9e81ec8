"""What `saccade merge` is given, looked at before anything heavy is imported.

ADAPTER ─┬─ adapter_config.json       an adapter in peft's format, of a run or of another program
         ├─ adapter/                  a saved model with its adapter
         └─ run.json, learner/        a checkpoint, of LoRA or of full weights
"""

from __future__ import annotations

from pathlib import Path

from vlm.errors import UserError


class MergeError(UserError, ValueError):
    """What cannot be merged, and why."""


def is_checkpoint(source: Path) -> bool:
    return (source / "run.json").exists() or (source / "learner").is_dir()


def adapter_in(source: Path) -> Path | None:
    """The folder of the adapter that `source` is or holds."""
    return next((d for d in (source, source / "adapter") if (d / "adapter_config.json").exists()), None)


def check_source(source: Path, output: Path) -> None:
    """Raises MergeError unless `source` may be merged into the new folder `output`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MergeError(f"{output} exists already; name a new folder")
    if not source.is_dir():
        raise MergeError(f"{source}: there is no such folder")
    if not is_checkpoint(source) and adapter_in(source) is None:
        raise MergeError(
            f"{source} holds neither adapter_config.json, nor a folder `adapter` with one, nor run.json: name an "
            "adapter in peft's format, a model saved with LoRA, or a checkpoint (checkpoints/step-...)"
        )
