"""Length: is the completion within bounds?

    minimum <= length <= maximum   1.0
    beyond                         falling to 0.0 over `slack` (a shorter one: from `minimum` to nothing)

Failure modes: by itself it pays for saying nothing (no `minimum`) or for padding (with one). Add it with a small weight
to a reward of substance, or let it multiply one. Lengths in tokens are known during a run. Completions from a file are
measured in words instead, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from rewards.base import ScoringRequest
from rewards.functions.format import one_of
from rollout.types import Verdict

Unit = Literal["tokens", "words", "characters"]


@dataclass(frozen=True, slots=True)
class LengthReward:
    """Scores 1.0 within the bounds, falling linearly to 0.0 outside of them."""

    separable: ClassVar[bool] = True
    maximum: int
    minimum: int = 0
    slack: int = 0
    """Over this length beyond `maximum`, the score falls to 0.0."""
    unit: Unit = "tokens"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, get_args(Unit))
        if not 0 <= self.minimum <= self.maximum or self.slack < 0:
            raise ValueError(
                f"expected 0 <= minimum <= maximum and 0 <= slack, not minimum={self.minimum}, "
                f"maximum={self.maximum}, slack={self.slack}"
            )

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        if self.unit == "tokens" and request.lengths:
            return [self._judge(length, "tokens") for length in request.lengths]
        if self.unit == "characters":
            return [self._judge(len(text), "characters") for text in request.completions]
        return [self._judge(len(text.split()), "words") for text in request.completions]

    def _judge(self, length: int, unit: str) -> Verdict:
        if length < self.minimum:
            return Verdict.scored(length / self.minimum, reason=f"{length} {unit}, fewer than {self.minimum}")
        over = length - self.maximum
        if over <= 0:
            return Verdict.scored(1.0)
        score = max(0.0, 1 - over / self.slack) if self.slack else 0.0
        return Verdict.scored(score, reason=f"{length} {unit}, more than {self.maximum}")
