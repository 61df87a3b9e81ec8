"""A reward is a function of a whole group: K completions in, K verdicts out.

RolloutGroup ──▶ ScoringRequest ──▶ RewardFunction ──▶ Verdicts      (rewards/actor.py adds limits and isolation)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout.types import Completion, Media, RolloutGroup, Verdict


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """What a reward may look at: one prompt and its K completions."""

    prompt: str
    completions: tuple[str, ...]
    """Decoded text of each completion, special tokens left out."""
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data row."""
    media: tuple[Media, ...] = ()
    raw: tuple[Completion, ...] = ()
    """Token ids, finish reasons and the like, for rewards that need them."""

    @classmethod
    def of(cls, group: RolloutGroup) -> ScoringRequest:
        prompt = group.prompt
        texts = tuple(c.text for c in group.completions)
        return cls(prompt.text, texts, prompt.answer, prompt.columns, prompt.media, group.completions)


class RewardFunction(Protocol):
    """Returns exactly one verdict per completion, in order. It may raise: that becomes K `error` verdicts."""

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]: ...
