"""Compare texts: exact_match, contains, edit_distance. For captions, transcripts, names and fixed phrases.

The row's answer is the gold text; of a JSON list of texts, the best match counts. Unless `case` is on, case, white
space and the form of letters do not count: ligatures, full-width letters, separate accents, curly quotes, dashes,
digits of other scripts and invisible signs are read as keyboards write them, and superscripts follow a `^` (x² is x^2,
not x2). Everything else counts: a full stop, a comma in a number, Markdown.

A word ends where no letter, digit or accent follows. Scripts without blanks between words (Chinese, Japanese, Korean,
Thai) have no such ends. A number is one word: 3 is not contained in 3.5, 3,000, 12:03, 2/3 or -3.

Failure modes: `exact_match` knows no synonyms. `contains` also pays for listing everything that could be right (unless
`max_words` limits the answer), for denying it ("it is not red"), and, in scripts without blanks, for longer words (熊猫
contains 猫). `edit_distance` pays for similar letters, not for similar meaning ("not red" is close to "red hat"), and
gives junk of the right length a little; with `threshold` (0.5 in ANLS), that is 0.0.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rewards.answers.golds import gold_forms
from rewards.base import ScoringRequest, unscorable
from rewards.functions.format import Scope, check_scope, judged_text, placed
from rollout.types import Verdict

MAX_CHARACTERS = 20_000
"""The most characters that edit_distance compares. Its time grows with the product of the lengths (0.4 s at this
limit)."""

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛`´′", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("–—‒―‐‑−", "-"),
        **dict.fromkeys("º˚", "°"),
        "⁄": "/",
        **dict.fromkeys("\ufe0e\ufe0f", ""),
    }
)
"""Translates curly quotes and dashes to those of keyboards, and removes characters that only control the display."""
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
_MIXED = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no blanks between words, or that attach particles to words, like Korean."""
_NUMBER_GOES_ON = re.compile(r"[.,:/]\d")
_NUMBER_BEFORE = re.compile(r"(?:\d[.,:/]|(?<![^\W_])[-+]|(?<!\S)\.)\Z")


def keyboard_form(text: str) -> str:
    """Return `text` without case, with single blanks, and with each letter and sign as keyboards write it."""
    text = _NOT_ASCII.sub(_visible, text).translate(_SIGNS)
    text = _MIXED.sub(" ", _RAISED.sub(lambda raised: f"^{raised[0]}", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).translate(_SIGNS).casefold())
    return " ".join(text.split())


def _visible(match: re.Match[str]) -> str:
    character = match[0]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return "" if unicodedata.category(character) == "Cf" else character


@dataclass(frozen=True, slots=True)
class _TextReward(ABC):
    """The common part of the three rewards: it chooses the texts to compare."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    case: bool = False
    """Whether case and white space count."""

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        golds = [gold for form in gold_forms(request.answer) if (gold := self._normal(form))]
        if not golds:
            return unscorable(request, "the row has no answer to compare with")
        return [self._judge(golds, text) for text in request.completions]

    def ideal(self, request: ScoringRequest) -> str | None:
        """Return a completion with the first gold form where this reward looks for it."""
        return placed(next(iter(gold_forms(request.answer)), None), self.scope)

    def _judge(self, golds: Sequence[str], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        answer = self._normal(answer)
        return max((self._compare(gold, answer) for gold in golds), key=lambda v: v.score or 0.0)

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text.strip()) if self.case else keyboard_form(text)

    @abstractmethod
    def _compare(self, gold: str, answer: str) -> Verdict:
        """Score one gold text against the answer, both in the form that is compared."""


@dataclass(frozen=True, slots=True)
class ExactMatchReward(_TextReward):
    """Scores 1.0 if the answer is the gold text, and 0.0 otherwise."""

    def _compare(self, gold: str, answer: str) -> Verdict:
        return Verdict.scored(1.0) if answer == gold else Verdict.scored(0.0, reason="another text")


@dataclass(frozen=True, slots=True)
class ContainsReward(_TextReward):
    """Scores 1.0 if the answer contains the gold text as whole words, and 0.0 otherwise."""

    max_words: int | None = None
    """Answers with more words score 0.0. Each letter of a script without blanks is a word."""

    def __post_init__(self) -> None:
        check_scope(self.scope)
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"max_words must be at least 1, not {self.max_words}")

    def _compare(self, gold: str, answer: str) -> Verdict:
        if self.max_words is not None and _words(answer) > self.max_words:
            return Verdict.scored(0.0, reason=f"longer than {self.max_words} words")
        start = answer.find(gold)
        while start >= 0:
            if _stands_alone(answer, start, start + len(gold)):
                return Verdict.scored(1.0)
            start = answer.find(gold, start + 1)
        return Verdict.scored(0.0, reason="does not contain the expected text")


def _words(text: str) -> int:
    apart = _WITHOUT_BLANKS.sub(" x ", text)
    return len(re.findall(r"(?:[^\W_]|(?<=[^\W\d_])'(?=[^\W\d_])|(?<=\d)[.,:](?=\d))+", apart))


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Return whether no word or number continues beyond `text[start:end]`."""
    before, behind = text[max(0, start - 2) : start], text[end : end + 3]
    first, last = text[start], text[end - 1]
    if before and (_in_word(first) or re.match(r"[-+]\d", text[start:end])) and _in_word(before[-1]):
        return False
    if behind and _in_word(last) and _in_word(behind[0]):
        return False
    if behind[:2] == "'t" and _in_word(last) and not behind[2:].isalpha():  # can't
        return False
    goes_on = last.isdecimal() and _NUMBER_GOES_ON.match(behind)
    return not (goes_on or (first.isdecimal() and _NUMBER_BEFORE.search(before)))


def _in_word(character: str) -> bool:
    return (character.isalnum() or unicodedata.category(character)[0] == "M") and not _WITHOUT_BLANKS.match(character)


@dataclass(frozen=True, slots=True)
class EditDistanceReward(_TextReward):
    """Scores 1 - Levenshtein distance / length of the longer text: 1.0 for the gold text, and 0.0 for nothing in
    common."""

    threshold: float = 0.0
    """A lower similarity scores 0.0."""

    def __post_init__(self) -> None:
        check_scope(self.scope)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a similarity of 0 to 1, not {self.threshold}")

    def _compare(self, gold: str, answer: str) -> Verdict:
        longest = max(len(gold), len(answer))
        if longest > MAX_CHARACTERS:
            return Verdict.scored(0.0, reason=f"longer than {MAX_CHARACTERS} characters")
        similarity = (longest - edit_distance(gold, answer)) / longest
        if similarity < self.threshold:
            return Verdict.scored(0.0, reason=f"similarity {similarity:.2f}, below {self.threshold}")
        return Verdict.scored(similarity)


def edit_distance(left: str, right: str) -> int:
    """Return the Levenshtein distance in characters (Wagner and Fischer 1974). The table is computed row by row: a
    deletion or a substitution looks at the row above, and insertions along the row are a running minimum of `cost -
    position`."""
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
