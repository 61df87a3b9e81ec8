"""The names of the rewards, and the only place where configured rewards become a function.

problems = check_rewards(config.reward.functions)      in the driver, before anything starts
score = build_rewards(config.reward.functions)         in the worker: ScoringRequest -> K Verdicts
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rewards.base import RewardFunction
from rewards.compose import Composite, Term, compose
from rewards.config import RewardSpec
from rewards.functions.accuracy import AccuracyReward
from rewards.functions.code_tests import CodeTestsReward
from rewards.functions.counting import CountingReward
from rewards.functions.format import FormatReward
from rewards.functions.grounding import GroundingReward
from rewards.functions.json_schema import JsonSchemaReward
from rewards.functions.judge import JudgeReward
from rewards.functions.language import LanguageReward
from rewards.functions.length import LengthReward
from rewards.functions.multiple_choice import MultipleChoiceReward
from rewards.functions.repetition import RepetitionReward
from rewards.functions.reward_model import RewardModelReward
from rewards.functions.text import ContainsReward, EditDistanceReward, ExactMatchReward
from rewards.functions.tool_call import ToolCallReward
from rewards.functions.user import RewardSetupError, load_user_reward
from vlm.user_code import short

REWARDS: dict[str, Callable[..., RewardFunction]] = {
    "format": FormatReward,
    "accuracy": AccuracyReward,
    "multiple_choice": MultipleChoiceReward,
    "exact_match": ExactMatchReward,
    "contains": ContainsReward,
    "edit_distance": EditDistanceReward,
    "counting": CountingReward,
    "grounding": GroundingReward,
    "json_schema": JsonSchemaReward,
    "tool_call": ToolCallReward,
    "code_tests": CodeTestsReward,
    "length": LengthReward,
    "repetition": RepetitionReward,
    "language": LanguageReward,
    "judge": JudgeReward,
    "reward_model": RewardModelReward,
}
"""Name -> factory of a shipped reward. The factory takes the options as keyword arguments."""
COMPARING = frozenset({"accuracy", "multiple_choice", "exact_match", "contains", "edit_distance", "counting"})
"""Rewards that need the row's answer."""
COLUMN_OPTIONS = ("column", "choices", "question")
"""Options of shipped rewards that name a data column."""
UNBOUNDED = frozenset({"reward_model"})
"""Rewards whose best score is not 1.0."""


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """Load a shipped reward by its name, or a user's by `package.module:function` or `path/file.py:function`.

    Raises RewardSetupError, which says what is wrong and what to do."""
    options = options or {}
    if ":" in name:
        return load_user_reward(name, options)
    factory = REWARDS.get(name)
    if factory is None:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RewardSetupError(
            f"unknown reward {name!r}; {hint}Shipped: {', '.join(sorted(REWARDS))}. "
            "Your own: package.module:function or path/file.py:function"
        )
    try:
        inspect.signature(factory).bind(**options)
        return factory(**options)
    except (TypeError, ValueError) as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        raise RewardSetupError(f"options of reward {name!r}: {error}; its options: {known}") from error


def check_rewards(specs: Sequence[RewardSpec]) -> list[str]:
    """Return all problems of the configured rewards, one line each. This imports users' modules."""
    problems = []
    names = [short(spec.name) for spec in specs]
    problems += [f"reward {n!r} is listed {names.count(n)} times" for n in dict.fromkeys(names) if names.count(n) > 1]
    for spec in specs:
        if not math.isfinite(spec.weight):
            problems.append(f"weight of reward {spec.name!r} is {spec.weight}; it must be a finite number")
        elif spec.combine != "sum" and spec.weight not in (0, 1):
            problems.append(
                f"weight of reward {spec.name!r} is {spec.weight}, but only rewards with combine: sum have "
                f"weights; with combine: {spec.combine} use 1 (or 0, to record it only)"
            )
        try:
            load_reward(spec.name, spec.options)
        except RewardSetupError as error:
            problems.append(str(error))
    if not any(spec.weight for spec in specs):
        problems.append("every reward has weight 0, so nothing would be learned; give one a weight")
    return problems


def columns_read(specs: Sequence[RewardSpec]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the data columns that the rewards need besides the answer, and those that they take if there are any.

    A reward that cannot be loaded reads nothing here; `check_rewards` says why."""
    needed: list[str] = []
    optional: list[str] = []
    for spec in specs:
        with suppress(RewardSetupError):
            reward = load_reward(spec.name, spec.options)
            needed += [name for option in COLUMN_OPTIONS if (name := getattr(reward, option, None)) is not None]
            needed += getattr(reward, "columns", ())
            optional += getattr(reward, "optional_columns", ())
    return tuple(dict.fromkeys(needed)), tuple(dict.fromkeys(optional))


def answers_are_programs(specs: Sequence[RewardSpec]) -> bool:
    """Return whether a reward reads the row's answer as tests of programs, in which nothing marks an answer. Other
    rewards then find the marked answer themselves (`gold_forms`)."""
    return any(spec.name == "code_tests" and spec.options.get("column", "tests") is None for spec in specs)


def build_rewards(specs: Sequence[RewardSpec]) -> Composite:
    """Combine the configured rewards into one.

    Raises:
        RewardSetupError: lists all problems.
    """
    if problems := check_rewards(specs):
        raise RewardSetupError("; ".join(problems))
    return compose([Term(short(s.name), s.weight, load_reward(s.name, s.options), s.combine) for s in specs])
