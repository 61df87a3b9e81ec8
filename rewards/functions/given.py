"""Functions that were given to `saccade.Trainer`, called with what TRL calls them with.

The Trainer writes a file of them into the run's folder; its functions are rewards of the user like those of any file:

    short = given(find("/home/me/rewards.py:short"), columns=("solution",), conversations="prompt")
    named = given(stored(__file__, "named"), columns=("solution",), conversations=None)
"""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm.user_code import find

__all__ = ["find", "given", "stored"]


def given(function: Callable[..., Any], *, columns: Sequence[str], conversations: str | None) -> Callable[..., Any]:
    """The function as a reward that is handed `columns` as the rows have them.

    `conversations`: the column of the prompts where they are lists of messages; prompts and completions are then
    lists of messages too."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(function)
    def scored(**arguments: Any) -> Any:
        if conversations is not None:
            arguments["prompts"] = [_messages(prompt) for prompt in arguments[conversations]]
            texts = arguments["completions"]
            arguments["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
            if conversations not in columns:
                del arguments[conversations]
        if not takes_all:
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        return function(**arguments)

    wanted = [*columns, *([conversations] if conversations is not None else [])]
    several = inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)
    named = [
        p.replace(kind=p.KEYWORD_ONLY) for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    scored.columns = tuple(dict.fromkeys(wanted))  # type: ignore[attr-defined]
    scored.__signature__ = inspect.Signature([*named, several])  # type: ignore[attr-defined]
    return scored


def stored(file: str, name: str) -> Callable[..., Any]:
    """A function that has no file of its own, from the one beside `file`."""
    function: Callable[..., Any] = pickle.loads(Path(file).with_name(f"{name}.pkl").read_bytes())
    return function


def _messages(prompt: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the null fields that Parquet adds to every part."""
    return [{**message, "content": _parts(message["content"])} for message in prompt]


def _parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{key: value for key, value in part.items() if value is not None} for part in content]
