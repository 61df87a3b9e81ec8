"""Accuracy: is the answer equal to the gold answer?

    gold is words ("red", "B", "12:30")        normalised equality, nothing else
    gold is mathematics ("3", "\\frac{1}{2}")   equality, else plain numbers exactly, else math-verify (symbolic)

Whatever cannot be read as an answer scores 0.0: a wrong answer is never right by accident.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rewards.base import ScoringRequest
from rewards.format import answer_text
from rewards.mathematics import expressions_equal, is_mathematics, numbers_equal, prose_equals
from rollout.types import Verdict

_WRAPPERS = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]|\\(?:boxed|text)\{([^{}]+)\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AccuracyReward:
    """1.0 for the gold answer, 0.0 for any other; `unscorable` where the row has no gold answer."""

    scope: Literal["answer", "completion"] = "answer"
    """What is compared: the text of the only `<answer>`, or the whole completion (of which the boxed or last
    expression counts if the gold answer is mathematics)."""

    def __post_init__(self) -> None:
        if self.scope not in ("answer", "completion"):
            raise ValueError(f"scope must be 'answer' or 'completion', not {self.scope!r}")

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        gold = request.answer
        if gold is None or not gold.strip():
            return [Verdict("unscorable", reason="the row has no answer to compare with")] * len(request.completions)
        return [self._judge(gold, text) for text in request.completions]

    def _judge(self, gold: str, completion: str) -> Verdict:
        prose = self.scope == "completion"
        answer = completion if prose else answer_text(completion)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        if matches(gold, answer, prose):
            return Verdict.scored(1.0)
        return Verdict.scored(0.0, reason="not the expected answer")

    def warm_up(self) -> None:
        """Imports math-verify and runs it once (1-2 s), so that no completion has to wait for that."""
        matches("\\frac{x+1}{2}", "$0.5(x + 1)$")


@lru_cache(maxsize=4096)
def matches(gold: str, answer: str, prose: bool = False) -> bool:
    """Whether `answer` equals `gold`; with `prose`, an expression is looked for in it. Cheapest comparison first."""
    gold, answer = unwrap(gold), unwrap(answer)
    if gold == answer:
        return True
    if not is_mathematics(gold):
        return _fold(gold) == _fold(answer)
    if (equal := numbers_equal(gold, answer)) is not None:
        return equal
    return prose_equals(gold, answer) if prose else expressions_equal(gold, answer)


def unwrap(text: str) -> str:
    """`text` without outer delimiters (`$..$`, `\\boxed{..}`), a final full stop, and white space but single blanks."""
    while True:
        text = " ".join(text.split())
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        match = _WRAPPERS.fullmatch(text)
        if match is None:
            return text
        text = next(group for group in match.groups() if group is not None)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
