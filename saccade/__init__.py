"""The public API: `import saccade`, or `python -m saccade train CONFIG`.

Nothing heavy is imported before it is asked for: a name is looked up in its module on first use.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.base import RewardFunction, ScoringRequest, TransientError
    from rollout.types import Verdict
    from saccade.config.load import load_config, parse_config
    from saccade.config.messages import ConfigError
    from saccade.config.run_config import RunConfig
    from saccade.errors import RunError
    from saccade.finished import RunResult
    from saccade.loop import evaluate, train
    from saccade.trainer.trainer import Trainer
    from vlm.adapter import MultimodalAdapter
    from vlm.errors import UserError

__version__ = "0.1.0"
"""Here and nowhere else: a submitted job runs from a folder where nothing is installed that could be asked."""

__all__ = [
    "ConfigError",
    "MultimodalAdapter",
    "RewardFunction",
    "RunConfig",
    "RunError",
    "RunResult",
    "ScoringRequest",
    "Trainer",
    "TransientError",
    "UserError",
    "Verdict",
    "evaluate",
    "load_config",
    "parse_config",
    "train",
]

_MODULES = {
    "rewards.base": "RewardFunction ScoringRequest TransientError",
    "rollout.types": "Verdict",
    "saccade.config.messages": "ConfigError",
    "saccade.config.load": "load_config parse_config",
    "saccade.config.run_config": "RunConfig",
    "saccade.errors": "RunError",
    "saccade.loop": "evaluate train",
    "saccade.finished": "RunResult",
    "saccade.trainer.trainer": "Trainer",
    "vlm.adapter": "MultimodalAdapter",
    "vlm.errors": "UserError",
}
"""Module -> what of it is public: the imports for type checkers above, once more."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def keep_names() -> None:
    """A user's folder or file named like one of our packages hides none of them. Ray calls this in every worker, and
    importing this package does."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        from vlm.import_path import ours_first
    finally:
        del sys.path[0]
    ours_first()


keep_names()
