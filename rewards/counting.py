"""Counting: how many? The answer must be one whole number, in digits or in words up to twelve.

Failure modes: a small gold number is easily guessed (always "2"); with `graded`, a guess near the middle of the data
earns most of the reward without looking. Answers with anything but the number in them are wrong ("3 or 4", "about 3",
"3 dogs": units of counting are given with `nouns`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewards.base import ScoringRequest, unscorable
from rewards.format import Scope, check_scope, judged_text
from rollout.types import Verdict

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NUMBER = re.compile(r"\+?([0-9]{1,9}|[0-9]{1,3}(?:,[0-9]{3}){1,2})(?:\.0+)?")


@dataclass(frozen=True, slots=True)
class CountingReward:
    """1.0 for the gold number, 0.0 for another or none; `unscorable` where the row's answer is no number."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    graded: bool = False
    """A wrong number earns 1 - |difference| / gold, at least 0.0, instead of nothing."""
    nouns: tuple[str, ...] = ()
    """Words that may follow the number ("dogs", "dog")."""

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        gold = self._read(request.answer or "")
        if gold is None:
            return unscorable(request, f"the row's answer {request.answer!r:.60} is no whole number")
        return [self._judge(gold, text) for text in request.completions]

    def _judge(self, gold: int, completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        count = None if answer is None else self._read(answer)
        if count is None:
            return Verdict.scored(0.0, reason="no single number")
        if count == gold:
            return Verdict.scored(1.0)
        score = max(0.0, 1 - abs(count - gold) / max(gold, 1)) if self.graded else 0.0
        return Verdict.scored(score, reason=f"counted {count}")

    def _read(self, text: str) -> int | None:
        words = text.strip()[:100].casefold().rstrip(".").split()
        if len(words) == 2 and words[1] in {noun.casefold() for noun in self.nouns}:
            words.pop()
        if len(words) != 1:
            return None
        if words[0] in _WORDS:
            return _WORDS.index(words[0])
        match = _NUMBER.fullmatch(words[0])
        return int(match[1].replace(",", "")) if match else None
