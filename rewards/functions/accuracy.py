"""Accuracy: is the answer equal to the gold answer, or to one of several?

    row's answer ──golds.py──▶ forms ──answers.py──▶ texts ──reading.py──▶ kinds ──equality.py──▶ equal to one of them?

The grammar of answers (each with what it equals; the full table is in docs/rewards.md):

    number       3, 1/2, 1,000, 6.63 \\times 10^{-34}     the same number, however it is written; 0.333333 is 1/3
      with %     50%                                      0.5, not 50
      with °     145°, 145^\\circ                          145
      with $, €  $5                                       5, not 5% and not €5
      with unit  3 cm, 3 apples                           the same unit, as text; see `units`
    expression   \\sqrt{2}, x^2+2x+1, a matrix             what has the same value at every point
    list, set    1, 2; 1 or 2; \\{1, 2\\}; 1 \\pm \\sqrt{2}    the same values in any order
    tuple        (1, 2)                                   the same values in this order
    interval     [0, 1), unions of them                   the same ends, 0 \\le x < 1
    name         x = 3; x = 3, y = 4; f(x) = x^2          the same names and values, or the values alone
    relation     x + y = 1, x < 5                         the same relation, however it is written
    time, ratio  12:30, 3:05 pm; 3:4                      12:30 pm; 6:8, 3/4
    letter       B                                        b, (B)
    words        red, Paris 2024, 2024-01-02              Red.
    solution     text that marks its answer: \\boxed{3}, <answer>3</answer>, #### 3 or `the answer is 3`

A row whose answer is a whole solution without one of these marks, or a struct, is `unscorable`, like a row without an
answer.

Failure modes: an answer that cannot be read as the gold's kind scores 0.0, so that a wrong answer is never right by
accident. The price is that a right answer in an unusual form is wrong ("3 apples" for "3"). With `tolerance`, an
estimate passes for a calculation. With `scope: completion`, rewards/answers/stated.py finds the answer, so a completion
that changes its mind without saying so is judged by its last answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, get_args

from rewards.answers.equality import same
from rewards.answers.golds import gold_forms, is_struct
from rewards.answers.kinds import Expression, Letter, Named, Quantity, Relation, Words
from rewards.answers.marks import boxed
from rewards.answers.notation import MAX_CHARACTERS, folded, plain
from rewards.answers.quantities import Units, quantities_equal
from rewards.answers.reading import read
from rewards.answers.stated import first_expression, gold_answers, is_abbreviation, last_expression, stated_answer
from rewards.base import ScoringRequest, unscorable
from rewards.functions.format import Scope, check_scope, judged_text, one_of
from rollout.types import Verdict

_FORMULA = re.compile(r"(?:[(\[]?[A-Z][a-z]?(?:_?\{?[0-9]+\}?)?[)\]]?){2,}")
"""Matches chemical formulas: H_2O, C6H12O6."""
_SUBSCRIPT = re.compile(r"[_{}]")


@dataclass(frozen=True, slots=True)
class AccuracyReward:
    """Scores 1.0 for a gold answer and 0.0 for any other. A row without a gold answer, or without a single one, is
    `unscorable`."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    """The text that is compared: that of the only `<answer>`, or the answer that the whole completion states or ends
    on."""
    tolerance: float = 0.0
    """Largest difference from the gold number, as a share of it (0.05 in ChartQA's relaxed accuracy)."""
    units: Units = "exact"
    """exact: the unit is part of the text; convert: `30 mm` is `3 cm`; optional: as convert, or without the gold's
    unit."""

    def __post_init__(self) -> None:
        check_scope(self.scope)
        one_of("units", self.units, get_args(Units))
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"tolerance is a share of the gold number and must be at least 0 and below 1, not {self.tolerance}"
            )

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        forms = gold_forms(request.answer)
        if not forms:
            return unscorable(request, "the row has no answer to compare with")
        golds = [gold for form in forms for gold in gold_answers(form)]
        if not golds:
            whole = "a whole solution that marks no answer, or several (\\boxed{}, <answer> or ####)"
            what = "a struct" if is_struct(forms[0]) else whole
            return unscorable(request, f"the row's answer is {what}: {forms[0]!r:.80}")
        return [self._judge(golds, text) for text in request.completions]

    def _judge(self, golds: Sequence[str], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        compare = completion_matches if self.scope == "completion" else matches
        if any(compare(gold, answer, self.tolerance, self.units) for gold in golds):
            return Verdict.scored(1.0)
        return Verdict.scored(0.0, reason="not the expected answer")

    def ideal(self, request: ScoringRequest) -> str | None:
        """Return a completion with the gold answer where this reward looks for it."""
        golds = [gold for form in gold_forms(request.answer) for gold in gold_answers(form)]
        if not golds:
            return None
        return f"\\boxed{{{golds[0]}}}" if self.scope == "completion" else f"<answer>{golds[0]}</answer>"

    def warm_up(self) -> None:
        """Import math-verify's parser and run it once (1-2 s), so that no completion has to wait for it."""
        matches("\\frac{x+1}{2}", "$0.5(x + 1)$")


@lru_cache(maxsize=4096)
def matches(gold: str, answer: str, tolerance: float = 0.0, units: Units = "exact") -> bool:
    """Return whether `answer`, or the box in it, equals `gold`. The cheapest comparison comes first."""
    if _identical(gold, answer):
        return True
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    if units != "exact":
        equal = quantities_equal(plain(gold), plain(answer), tolerance, optional=units == "optional")
        if equal is not None:
            return equal
    if same(read(gold), read(answer), tolerance):
        return True
    box = boxed(answer)
    return box is not None and any(form != answer and matches(gold, form, tolerance, units) for form in box.forms)


def _identical(gold: str, answer: str) -> bool:
    """Return whether the texts are equal up to white space; for words, also up to case."""
    left, right = plain(gold), plain(answer)
    if left == right:
        return bool(left) or not answer.strip()
    kind = read(gold)
    loose = isinstance(kind, Expression | Named | Relation | Quantity) or (isinstance(kind, Words) and "\\" in left)
    if loose and left.replace(" ", "") == right.replace(" ", ""):
        return True
    if _FORMULA.fullmatch(left) and _SUBSCRIPT.sub("", left) == _SUBSCRIPT.sub("", right):
        return True
    return folded(left) == folded(right) and isinstance(kind, Words | Letter)


@lru_cache(maxsize=4096)
def completion_matches(gold: str, completion: str, tolerance: float = 0.0, units: Units = "exact") -> bool:
    """Return whether the answer that `completion` states, or else ends on, equals `gold`."""
    found = stated_answer(completion)
    said = completion if found is None else found.text
    if any(matches(gold, form, tolerance, units) for form in (found.forms if found else (said,))):
        return True
    target = read(gold)
    if isinstance(target, Words | Letter) or (found is not None and found.rule in ("box", "answer")):
        return False
    if found is not None and found.rule == "phrase":
        stated = read(said)
        in_words = isinstance(stated, Words) or (isinstance(stated, Quantity) and not is_abbreviation(stated.unit))
        expression = first_expression(said) if in_words else None
        return expression is not None and _ends_on(gold, expression, "", tolerance, units)
    if found is not None and not isinstance(read(said), Words):
        return False
    last = last_expression(completion)
    return last is not None and _ends_on(gold, *last, tolerance, units)


def _ends_on(gold: str, expression: str, behind: str, tolerance: float, units: Units) -> bool:
    if not isinstance(read(gold), Quantity):
        return matches(gold, expression, tolerance, units)
    words = behind.split()
    return any(matches(gold, " ".join([expression, *words[:n]]), tolerance, units) for n in range(len(words) + 1))
