"""Accuracy: is the answer equal to the gold answer, or to one of several?

    gold is words ("red", "B", "12:30")         normalised equality, nothing else
    gold is mathematics ("3", "\\frac{1}{2}")    equality, else plain numbers exactly, else math-verify (symbolic)
    gold is a number with a unit ("3 cm")       with `units`: the same quantity

A row's answer that is a JSON list of texts (`["1/2", "50 cents"]`) has several gold forms, one of which is enough.
Failure modes: whatever cannot be read as an answer scores 0.0, so that a wrong answer is never right by accident; the
price is that a right answer in an unusual form is wrong ("3 apples" for "3"). With `tolerance` an estimate passes for
a calculation. With `scope: completion` the last expression counts, so that a completion that ends on its guess and then
goes on with numbers is judged by those.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, get_args

from rewards.base import ScoringRequest, unscorable
from rewards.format import Scope, check_scope, judged_text, one_of
from rewards.golds import gold_forms
from rewards.mathematics import expressions_equal, is_mathematics, numbers_equal, prose_equals, value_of
from rewards.quantities import Units, quantities_equal
from rollout.types import Verdict

_WRAPPERS = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]|\\(?:boxed|text)\{([^{}]+)\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AccuracyReward:
    """1.0 for a gold answer, 0.0 for any other; `unscorable` where the row has no gold answer."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    """What is compared: the text of the only `<answer>`, or the whole completion (of which the boxed or last
    expression counts if the gold answer is mathematics)."""
    tolerance: float = 0.0
    """Largest difference of a number from the gold number, as a share of that (0.05 in ChartQA's relaxed accuracy)."""
    units: Units = "exact"
    """exact: part of the text; convert: `30 mm` is `3 cm`; optional: as convert, or without the gold's unit."""

    def __post_init__(self) -> None:
        check_scope(self.scope)
        one_of("units", self.units, get_args(Units))
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is a share of the gold number, at least 0 and below 1, not {self.tolerance}")

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        golds = gold_forms(request.answer)
        if not golds:
            return unscorable(request, "the row has no answer to compare with")
        return [self._judge(golds, text) for text in request.completions]

    def _judge(self, golds: Sequence[str], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        prose = self.scope == "completion"
        if any(matches(gold, answer, prose, self.tolerance, self.units) for gold in golds):
            return Verdict.scored(1.0)
        return Verdict.scored(0.0, reason="not the expected answer")

    def warm_up(self) -> None:
        """Imports math-verify and runs it once (1-2 s), so that no completion has to wait for that."""
        matches("\\frac{x+1}{2}", "$0.5(x + 1)$")


@lru_cache(maxsize=4096)
def matches(gold: str, answer: str, prose: bool = False, tolerance: float = 0.0, units: Units = "exact") -> bool:
    """Whether `answer` equals `gold`; with `prose`, an expression is looked for in it. Cheapest comparison first."""
    gold, answer = unwrap(gold), unwrap(answer)
    if gold == answer:
        return True
    if (
        units != "exact"
        and (same := quantities_equal(gold, answer, tolerance, optional=units == "optional")) is not None
    ):
        return same
    if not is_mathematics(gold):
        return _fold(gold) == _fold(answer)
    if (equal := numbers_equal(gold, answer)) is not None and (equal or not tolerance):
        return equal
    if tolerance and (target := value_of(gold)) is not None and (value := value_of(answer)) is not None:
        return abs(value - target) <= tolerance * abs(target) * (1 + 1e-9)  # 4.2 is within 0.05 of 4
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
