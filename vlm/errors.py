"""The base of all errors that are for the user, and the error of adapters."""

from __future__ import annotations


class UserError(Exception):
    """The message says what is wrong, where, and what to do. The command line shows only the message. Any other
    exception is a defect of this project and is shown with its traceback."""


class AdapterError(UserError, ValueError):
    """The model's files and the adapter do not fit, or a prompt cannot be encoded. Says which, and why."""
