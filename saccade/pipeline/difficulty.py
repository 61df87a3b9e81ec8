"""Difficulty chooses prompts that are worth a step: those that are neither always nor never answered well.

Difficulty       before: passes over prompts whose mean reward so far is out of range, from their second epoch on
without_signal   after: groups whose scores are all equal, which dynamic sampling replaces (DAPO, arXiv:2503.14476)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from learner.algorithm.advantages import contributes
from rollout.types import GroupSummary, PromptRef


@dataclass
class Difficulty:
    """Running mean reward by prompt, over all its completions that were scored: with a reward of 0 or 1, its solve
    rate."""

    low: float
    high: float
    passed_over: int = 0
    """Prompts left out so far."""
    _totals: dict[str, tuple[float, int]] = field(default_factory=dict)

    def observe(self, summary: GroupSummary) -> None:
        total, count = self._totals.get(summary.ref.uid, (0.0, 0))
        scores = [r for r, valid in zip(summary.rewards, summary.valid, strict=True) if valid]
        self._totals[summary.ref.uid] = (total + sum(scores), count + len(scores))

    def admits(self, ref: PromptRef) -> bool:
        """A prompt without a score so far is always admitted."""
        total, count = self._totals.get(ref.uid, (0.0, 0))
        return count == 0 or self.low <= total / count <= self.high

    def state(self) -> dict[str, Any]:
        return {"passed_over": self.passed_over, "totals": dict(self._totals)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.passed_over = state["passed_over"]
        self._totals = {uid: (total, count) for uid, (total, count) in state["totals"].items()}


def without_signal(summaries: Sequence[GroupSummary]) -> list[bool]:
    """Say of each group whether it gives no policy gradient."""
    if not summaries:
        return []
    rewards, valid = (np.array([getattr(s, name) for s in summaries]) for name in ("rewards", "valid"))
    return [not c for c in contributes(rewards, valid).tolist()]
