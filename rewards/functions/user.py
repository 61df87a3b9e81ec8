"""Load the user's own rewards by name, check them before a run starts, and call them with data columns as keyword
arguments.

    def brevity(completions, answer=None, max_words=50, **columns):        # package.module:brevity, or file.py:brevity
        return [1.0 if len(text.split()) <= max_words else 0.0 for text in completions]

A function with a parameter `request` (or annotated `ScoringRequest`) gets that instead and returns Verdicts.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from rewards.base import RewardFunction, ScoringRequest, Service
from rollout.types import Completion, Verdict, is_finite
from vlm.errors import UserError
from vlm.user_code import UserCodeError, find

_GIVEN = ("completions", "completion_ids", "prompts", "answer")
"""Keyword arguments that every function may take. All others are data columns."""


class RewardSetupError(UserError, ValueError):
    """A reward cannot be used as configured; the message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class _UserReward:
    """A user's function. Its optional attributes (see rewards/base.py) become those of the reward."""

    function: Callable[..., Any]
    options: Mapping[str, Any]

    @property
    def separable(self) -> bool:
        return bool(getattr(self.function, "separable", False))

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the data columns that it needs: those in the function's attribute `columns`."""
        return tuple(getattr(self.function, "columns", ()))

    def warm_up(self) -> None:
        if warm_up := getattr(self.function, "warm_up", None):
            warm_up()

    def connect(self, services: Mapping[str, Service]) -> None:
        if connect := getattr(self.function, "connect", None):
            connect(services)


@dataclass(frozen=True, slots=True)
class ColumnReward(_UserReward):
    """Calls `function(completions=[...K], prompts=[...K], answer=[...K], <column>=[...K], **options)`, with each
    argument only if the function takes it. The function returns K numbers, with None for a completion that cannot be
    scored."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return those, and the parameters without a default that no option sets."""
        named = [p.name for p in self._of_columns() if p.default is p.empty]
        return tuple(dict.fromkeys((*getattr(self.function, "columns", ()), *named)))

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Return the data columns that it takes if there are any: parameters with a default that no option sets."""
        return tuple(p.name for p in self._of_columns() if p.default is not p.empty)

    def _of_columns(self) -> list[inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters.values()
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return [p for p in parameters if p.kind not in several and p.name not in (*_GIVEN, *self.options)]

    @property
    def needs_media(self) -> bool:
        """Return whether the function takes token ids, as TRL's functions may."""
        return "completion_ids" in inspect.signature(self.function).parameters

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        count = len(request.completions)
        rows = {"prompts": request.prompt, "answer": request.answer, **request.columns}
        arguments = {name: [value] * count for name, value in rows.items()}
        arguments["completions"] = list(request.completions)
        if self.needs_media:
            arguments["completion_ids"] = [_token_ids(completion) for completion in request.raw]
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        result = _finish(self.function(**{**arguments, **self.options}))
        if hasattr(result, "tolist"):  # numpy and torch
            result = result.tolist()
        if isinstance(result, str | Mapping) or not isinstance(result, Sequence):
            raise TypeError(f"a reward function must return a list of {count} numbers, not a {type(result).__name__}")
        return [as_verdict(value) for value in result]


@dataclass(frozen=True, slots=True)
class RequestReward(_UserReward):
    """Calls `function(request, **options)`, which returns K Verdicts and may read images and token ids."""

    needs_media: ClassVar[bool] = True

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        return list(_finish(self.function(request, **self.options)))


def _token_ids(completion: Completion) -> list[int]:
    return [int(token) for segment in completion.segments for token in segment.token_ids]


def _finish(result: Any) -> Any:
    return asyncio.run(_await(result)) if inspect.isawaitable(result) else result


async def _await(result: Any) -> Any:
    return await result


def as_verdict(value: Any) -> Verdict:
    """Turn a returned value into a verdict: a number is a score, None is `unscorable`, and anything else, including NaN
    and infinity, is an `error`."""
    if value is None:
        return Verdict("unscorable", reason="the reward function returned None")
    if not isinstance(value, Real):
        return Verdict("error", reason=f"returned {value!r:.80} of type {type(value).__name__}, not a number")
    number: Any = value
    if not is_finite(number):  # before float(), which raises where an int or a fraction is beyond its range
        return Verdict("error", reason=f"returned {_short(number)}, which is not a finite float32 number")
    return Verdict.scored(float(number))


def _short(number: Any) -> str:
    try:
        return f"{float(number)}"
    except OverflowError:
        return f"a number beyond {sys.float_info.max:.1e}"


def load_user_reward(name: str, options: Mapping[str, Any]) -> RewardFunction:
    """Load the reward `package.module:function` or `path/file.py:function`.

    Args:
        options: constant keyword arguments of every call.
    Raises:
        RewardSetupError: not importable, not a function, or with a signature that cannot be called.
    """
    try:
        function = find(name)
    except UserCodeError as error:
        raise RewardSetupError(str(error)) from error
    if inspect.isclass(function) or not callable(function):
        raise RewardSetupError(f"{name} is {_kind(function)}; name a function")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise RewardSetupError(f"{name} has no readable signature; wrap it in a function ({error})") from error
    _check_options(name, options, parameters)
    first = next(iter(parameters.values()), None)
    if first and (first.name == "request" or first.annotation in (ScoringRequest, "ScoringRequest")):
        reward: RewardFunction = RequestReward(function, dict(options))
    else:
        if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise RewardSetupError(
                f"{name}{inspect.signature(function)} takes neither `completions` nor `request`; write "
                "def reward(completions, answer, **columns) -> list[float | None]"
            )
        reward = ColumnReward(function, dict(options))
    _check_parameters(name, parameters, options, takes_request=isinstance(reward, RequestReward))
    return reward


def _kind(thing: Any) -> str:
    return "a class" if inspect.isclass(thing) else f"a {type(thing).__name__}"


def _check_options(name: str, options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := sorted(set(options) - set(parameters)):
        raise RewardSetupError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(parameters) or 'none'}")


def _check_parameters(
    name: str, parameters: Mapping[str, inspect.Parameter], options: Mapping[str, Any], *, takes_request: bool
) -> None:
    """Check the parameters, which are passed by name. All others of a function that takes `request` must come from its
    options; those of another function are data columns."""
    for position, parameter in enumerate(parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if takes_request and position == 0:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RewardSetupError(
                f"{name}: parameter `{parameter.name}` is positional-only, but arguments are passed by name"
            )
        if takes_request and parameter.default is parameter.empty and parameter.name not in options:
            raise RewardSetupError(
                f"{name} needs `{parameter.name}`; set it in the reward's options, or give it a default"
            )
