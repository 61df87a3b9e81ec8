"""The errors that end a run early, in words for the user."""

from __future__ import annotations

from vlm.errors import UserError


class RunError(UserError, RuntimeError):
    """The run cannot continue; says what happened, where, and what to do."""


class MismatchError(RunError):
    """Engine and learner hold the same weights and disagree: what the update made of it is kept nowhere."""


class RunStopped(Exception):
    """The user asked the run to stop (Ctrl-C, SIGTERM); its state is saved on the way out."""
