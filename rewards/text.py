"""Comparing texts: exact_match, contains, edit_distance. For captions, transcripts, names, fixed phrases.

The row's answer is the gold text; where it is a JSON list of texts, the best of them counts. Case and white space do
not count unless `case` is on, nor do forms of the same letters: ligatures, full-width letters, curly quotes, dashes and
non-breaking blanks are as keyboards write them.

Failure modes: `exact_match` knows no synonyms. `contains` pays for listing everything that could be right, unless
`max_words` bounds the answer. `edit_distance` pays for what is similar in letters, not in meaning ("not red" scores
high against "red hat"), and gives junk of the right length a little; with `threshold` (0.5 in ANLS) that is 0.0.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rewards.base import ScoringRequest, unscorable
from rewards.format import Scope, check_scope, judged_text
from rewards.golds import gold_forms
from rollout.types import Verdict

MAX_CHARACTERS = 20_000
"""Longest text that edit_distance compares; its time grows with the product of the lengths (0.4 s at this one)."""


_QUOTES = str.maketrans("‘’‚“”„–—‐‑−", "'''\"\"\"-----")
"""Curly quotes and dashes as keyboards have them."""


@dataclass(frozen=True, slots=True)
class _TextReward(ABC):
    """What the three have in common: which texts are compared."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    case: bool = False
    """Upper and lower case and white space count too."""

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        golds = [self._normal(gold) for gold in gold_forms(request.answer)]
        if not golds:
            return unscorable(request, "the row has no answer to compare with")
        return [self._judge(golds, text) for text in request.completions]

    def _judge(self, golds: Sequence[str], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        answer = self._normal(answer)
        return max((self._compare(gold, answer) for gold in golds), key=lambda v: v.score or 0.0)

    def _normal(self, text: str) -> str:
        if self.case:
            return unicodedata.normalize("NFC", text)
        text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
        return " ".join(text.casefold().split())

    @abstractmethod
    def _compare(self, gold: str, answer: str) -> Verdict:
        """Of one gold text and the answer, both in the form that is compared."""


@dataclass(frozen=True, slots=True)
class ExactMatchReward(_TextReward):
    """1.0 where the answer is the gold text, else 0.0."""

    def _compare(self, gold: str, answer: str) -> Verdict:
        return Verdict.scored(1.0) if answer == gold else Verdict.scored(0.0, reason="another text")


@dataclass(frozen=True, slots=True)
class ContainsReward(_TextReward):
    """1.0 where the gold text stands in the answer, as whole words; else 0.0."""

    max_words: int | None = None
    """Longer answers score 0.0."""

    def _compare(self, gold: str, answer: str) -> Verdict:
        if self.max_words is not None and len(answer.split()) > self.max_words:
            return Verdict.scored(0.0, reason=f"longer than {self.max_words} words")
        start = answer.find(gold)
        while start >= 0:
            end = start + len(gold)
            before, after = answer[max(0, start - 1) : start], answer[end : end + 1]
            if not (before.isalnum() and gold[0].isalnum()) and not (after.isalnum() and gold[-1].isalnum()):
                return Verdict.scored(1.0)
            start = answer.find(gold, start + 1)
        return Verdict.scored(0.0, reason="does not contain the expected text")


@dataclass(frozen=True, slots=True)
class EditDistanceReward(_TextReward):
    """1 - Levenshtein distance / length of the longer text: 1.0 for the gold text, 0.0 for nothing in common."""

    threshold: float = 0.0
    """Lower similarities score 0.0."""

    def _compare(self, gold: str, answer: str) -> Verdict:
        if max(len(gold), len(answer)) > MAX_CHARACTERS:
            return Verdict.scored(0.0, reason=f"longer than {MAX_CHARACTERS} characters")
        similarity = 1 - edit_distance(gold, answer) / max(len(gold), len(answer), 1)
        if similarity < self.threshold:
            return Verdict.scored(0.0, reason=f"similarity {similarity:.2f}, below {self.threshold}")
        return Verdict.scored(similarity)


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance in characters (Wagner and Fischer 1974), a row of the table at a time: a deletion or a
    substitution looks at the row above; insertions along the row are a running minimum of `cost - position`."""
    if len(left) > len(right):
        left, right = right, left  # fewer and longer rows
    codes = np.array([ord(c) for c in right], dtype=np.int32)
    positions = np.arange(len(right) + 1, dtype=np.int32)
    row = positions.copy()
    for i, character in enumerate(left, 1):
        best = np.empty_like(row)
        best[0] = i
        np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)), out=best[1:])
        row = np.minimum.accumulate(best - positions) + positions
    return int(row[-1])
