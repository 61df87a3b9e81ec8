"""The section `reward`: which rewards, and what they may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from rewards.compose import Combine
from vlm.section import ListOfOne, section, short


@section
class RewardSpec:
    """One reward as configured."""

    name: str
    """`format`, `accuracy`, another shipped reward, or package.module:function (file.py:function)."""
    weight: float = 1.0
    """Its factor in the sum; 0: it is only recorded."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward."""
    combine: Combine = "sum"
    """How it enters the whole: in the sum, as a factor of the sum (a gate), or as its upper bound."""


@section
class RewardConfig:
    functions: Annotated[tuple[Annotated[RewardSpec, short("name")], ...], ListOfOne] = (
        RewardSpec("format", 0.5),
        RewardSpec("accuracy"),
    )
    """Rewards, summed by weight, or combined as each one's `combine` says."""
    check_golds: bool = True
    """Score golds of a few hundred rows against themselves first, and do not start where they miss full marks."""
    max_failed_share: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of a batch's completions whose reward may fail (error or timeout) before the run stops."""
    actors: Annotated[int, Ge(1)] = 1
    """Number of reward actors."""
    timeout: Annotated[float, Gt(0)] = 30.0
    """Seconds one call on one group may take; then its worker is killed. See docs/rewards.md for what is lost."""
