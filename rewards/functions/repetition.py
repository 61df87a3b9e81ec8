"""Repetition: how much of the text is new? The share of distinct n-grams among all of them.

    "a b c d e f"          n=3: 4 of 4 distinct     1.0
    "a b a b a b"          n=3: 2 of 4 distinct     0.5

Failure modes: a text shorter than n words scores 1.0, and so does an empty one: add this reward to a reward of
substance. Tables, code and lists repeat for good reasons. Text without blanks (Chinese, or one letter over and over) is
one word. There, and wherever more than `max_word` characters are not separated, characters are counted instead of
words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewards.base import ScoringRequest
from rollout.types import Verdict


@dataclass(frozen=True, slots=True)
class RepetitionReward:
    """Scores distinct n-grams / n-grams: 1.0 for no repetition, and close to 0.0 for pure repetition."""

    separable: ClassVar[bool] = True
    n: int = 4
    max_word: int = 40

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_word < 1:
            raise ValueError(f"n and max_word must be at least 1, not {self.n} and {self.max_word}")

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        return [self._judge(text) for text in request.completions]

    def _judge(self, text: str) -> Verdict:
        words: Sequence[str] = text.split()
        if any(len(word) > self.max_word for word in words):
            words = text
        count = len(words) - self.n + 1
        if count < 1:
            return Verdict.scored(1.0)
        distinct = len({tuple(words[i : i + self.n]) for i in range(count)})
        return Verdict.scored(distinct / count, note=f"{distinct} of {count} {self.n}-grams are distinct")
