"""Counting: how many? The answer must be one whole number and nothing else.

    3, ３, 3.0, 1,200, +3, n = 3, 3 + 4 = 7      as `accuracy` reads numbers (rewards/answers/reading.py)
    **3**, $3$, \\boxed{3}, 3.                   with what stands around an answer
    three, Twenty-one, one hundred and five     in English words, up to 999
    3 dogs, three red balls                     with one of the `nouns` behind it, if such are given

With `scope: completion`, the answer is the one that the completion states (the last box, <answer>, `the answer is`,
####), or else its last expression, as for `accuracy`.

Failure modes: a small gold number is easily guessed (always "2"). With `graded`, a guess near the middle of the data
earns most of the reward without looking. Answers with anything but the number in them are wrong: "3 or 4", "about 3",
"~3", "3-4", "6/2", "3%", "3 dogs" (without `nouns`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewards.answers.golds import gold_forms
from rewards.answers.kinds import Kind, Named, Quantity, Words
from rewards.answers.notation import folded, plain
from rewards.answers.numbers import Number
from rewards.answers.reading import read
from rewards.answers.stated import first_expression, last_expression, stated_answer
from rewards.base import ScoringRequest, unscorable
from rewards.functions.format import Scope, check_scope, judged_text, placed
from rollout.types import Verdict

_DIGITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_ONES = ["zero", *_DIGITS, "ten", "eleven", "twelve", *_TEENS]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ROUGH = re.compile(r"[~≈≃∼±]|\\(?:approx|sim(?:eq)?|pm)(?![a-zA-Z])|\\frac|/")
"""Matches signs that turn a number into an estimate or a share."""


@dataclass(frozen=True, slots=True)
class CountingReward:
    """Scores 1.0 for the gold number, and 0.0 for another or none. A row whose answer is not a number is
    `unscorable`."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    graded: bool = False
    """Score a wrong number 1 - |difference| / gold (at least 0.0) instead of 0.0."""
    nouns: tuple[str, ...] = ()
    """Words that may follow the number ("dogs", "dog")."""

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        golds = {count for form in gold_forms(request.answer) if (count := self._read(form)) is not None}
        if not golds:
            return unscorable(request, f"the row's answer {request.answer!r:.60} is not a whole number")
        return [self._judge(golds, text) for text in request.completions]

    def ideal(self, request: ScoringRequest) -> str | None:
        """Return a completion with the first gold form that is a count, where this reward looks for it."""
        counts = (form for form in gold_forms(request.answer) if self._read(form) is not None)
        return placed(next(counts, None), self.scope)

    def _judge(self, golds: set[int], completion: str) -> Verdict:
        count = self._concluded(completion) if self.scope == "completion" else self._answered(completion)
        if count is None:
            return Verdict.scored(0.0, reason="no single number")
        if count in golds:
            return Verdict.scored(1.0)
        score = max(_closeness(gold, count) for gold in golds) if self.graded else 0.0
        return Verdict.scored(score, reason=f"counted {str(count)[:20]}")

    def _answered(self, completion: str) -> int | None:
        answer = judged_text(completion, "answer")
        return None if answer is None else self._read(answer)

    def _concluded(self, completion: str) -> int | None:
        found = stated_answer(completion)
        said = completion if found is None else found.text
        if (count := self._read(said)) is not None:
            return count
        if found is None:
            last = last_expression(completion)
            return None if last is None else self._read(last[0])
        first = first_expression(said) if found.rule == "phrase" and isinstance(read(said), Words | Quantity) else None
        return None if first is None else self._read(first)

    def _read(self, text: str) -> int | None:
        """Return the count, if it is all of `text`."""
        if len(text) > 1000 or _ROUGH.search(text):
            return None
        text = folded(plain(text))
        for noun in (folded(noun) for noun in self.nouns):
            if text.endswith(noun) and len(text) > len(noun) and not text[-len(noun) - 1].isalpha():
                text = text[: -len(noun)].rstrip()
                break
        return _whole(read(text)) if (count := _spelled(text)) is None else count


def _whole(kind: Kind) -> int | None:
    if isinstance(kind, Named) and len(kind.values) == 1:
        kind = kind.values[0]
    if not isinstance(kind, Number) or kind.sign or kind.value < 0 or kind.value.denominator != 1:
        return None
    return kind.value.numerator


def _spelled(text: str) -> int | None:
    """Return the number that English words name."""
    words, hundreds = text.replace("-", " ").split(), 0
    if words[1:2] == ["hundred"] and words[0] in ("a", *_DIGITS):
        hundreds = 100 if words[0] == "a" else 100 * _ONES.index(words[0])
        words = words[3:] if words[2:3] == ["and"] and words[3:] else words[2:]
        if not words:
            return hundreds
    if len(words) == 2 and words[0] in _TENS and words[1] in _DIGITS:
        return hundreds + 10 * (_TENS.index(words[0]) + 2) + _ONES.index(words[1])
    if len(words) != 1 or words[0] not in (*_ONES, *_TENS):
        return None
    return hundreds + (_ONES.index(words[0]) if words[0] in _ONES else 10 * (_TENS.index(words[0]) + 2))


def _closeness(gold: int, count: int) -> float:
    scale = max(gold, 1)
    difference = abs(count - gold)
    return 1 - difference / scale if difference < scale else 0.0
