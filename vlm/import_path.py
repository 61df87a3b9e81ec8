"""Names of our packages mean our packages, whatever folders a user has beside a configuration.

A process finds modules along `sys.path`, where a user's folder often stands first: the working directory of
`python -m`, the folder of a script, the one that `ray job submit --working-dir` ships. A folder `rewards/` or a file
`vlm.py` in it would be imported in place of ours. So whoever starts a process of ours, or adds a folder to `sys.path`,
calls `ours_first`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = ("rollout", "learner", "rewards", "weight_sync", "vlm")
"""Our packages with names that a user's folder may have too."""
ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds them."""


def ours_first() -> None:
    """Move folders of `sys.path` with modules named like our packages after ours, and keep their order.

    Modules in a user's folder of such a name are still found under that name, where we have none of their own name.
    Raises ImportError where another package has been imported under one of the names already."""
    last = hiding()
    if last:
        first = [entry for entry in sys.path if entry not in last]
        sys.path[:] = [*first, *([] if str(ROOT) in first else [str(ROOT)]), *last]
    for name in NAMES:
        module = importlib.import_module(name)
        if (found := getattr(module, "__file__", None)) is None or Path(found).resolve().parents[1] != ROOT:
            where = found or f"the folder {next(iter(module.__path__), name)}"
            raise ImportError(
                f"`{name}` was imported from {where} before saccade, which has a package of that name in {ROOT}: "
                "import saccade first"
            )
        theirs = [str(Path(entry).absolute() / name) for entry in last if (Path(entry) / name).is_dir()]
        module.__path__ += [folder for folder in theirs if folder not in module.__path__]


def hiding() -> list[str]:
    """Folders of `sys.path`, but for our own, with a folder or file named like one of our packages."""
    return [entry for entry in dict.fromkeys(sys.path) if _is_folder(entry) and _has_name_of_ours(Path(entry))]


def _is_folder(entry: str) -> bool:
    return Path(entry).is_dir() and Path(entry).resolve() != ROOT


def _has_name_of_ours(folder: Path) -> bool:
    return any((folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in NAMES)
