"""Check the input of `saccade merge` before anything heavy is imported.

ADAPTER ─┬─ adapter_config.json       an adapter in peft's format, of a run or of another program
         ├─ adapter/                  a saved model with its adapter
         └─ run.json, learner/        a checkpoint, of LoRA or of full weights
"""

from __future__ import annotations

from pathlib import Path

from vlm.errors import UserError


class MergeError(UserError, ValueError):
    """The source cannot be merged; the message says why."""


def is_checkpoint(source: Path) -> bool:
    return (source / "run.json").exists() or (source / "learner").is_dir()


def adapter_in(source: Path) -> Path | None:
    """Return the folder of the adapter: `source` itself, or `adapter/` in it. None if there is no adapter."""
    return next((d for d in (source, source / "adapter") if (d / "adapter_config.json").exists()), None)


def check_source(source: Path, output: Path) -> None:
    """Raise MergeError unless `source` can be merged into the new folder `output`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MergeError(f"{output} already exists; name a new folder")
    if not source.is_dir():
        raise MergeError(f"{source}: no such folder")
    if not is_checkpoint(source) and adapter_in(source) is None:
        raise MergeError(
            f"{source} contains neither adapter_config.json, nor adapter/adapter_config.json, nor run.json; name "
            "a LoRA adapter in peft's format, a model saved with LoRA, or a checkpoint (checkpoints/step-...)"
        )
