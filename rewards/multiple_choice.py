"""Multiple choice: does the answer pick the gold letter, and no other?

    gold: "B", or the text of the right choice where the row's choices are known
    read: "B", "(b)", "B.", "B) a dog", "**B**", "option B", "the answer is B", "a dog" (where the choices are known)

Failure modes: with two choices, guessing earns 0.5 on average. An answer that names two letters is wrong, also where it
rules one of them out ("not A but B"); an answer in words is wrong where the choices are not known. A lone "A" that
begins a sentence is no choice, unless punctuation follows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.base import ScoringRequest, unscorable
from rewards.format import Scope, check_scope, judged_text
from rollout.types import Verdict

_LONE = re.compile(r"[(\[*\"'` ]*([A-Za-z])[)\].:*\"'` ]*")
_LED = re.compile(r"[(\[*]*([A-Z])(?:[)\]:]|\*\*|\.(?=\s))\s*(.+)", re.DOTALL)
_SAID = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*[(\[*]*([A-Z])\b")
_LISTED = re.compile(r"(?m)^\s*\(?([A-Z])[).:]\s*(\S.*?)\s*$")


@dataclass(frozen=True, slots=True)
class MultipleChoiceReward:
    """1.0 for the gold choice, 0.0 for another, several or none; `unscorable` where the row's answer is no choice."""

    separable: ClassVar[bool] = True
    scope: Scope = "answer"
    choices: str | None = None
    """Column with the choices: a list of texts (A, B, ... in order) or a mapping of letters to texts. None: they are
    read from the lines of the prompt that begin with `A.`, `B)`, `(C)`, if there are such."""

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        choices = _choices(request.columns.get(self.choices) if self.choices else None, request.prompt)
        gold = picked(request.answer or "", choices)
        if gold is None:
            return unscorable(request, f"the row's answer {request.answer!r:.60} is none of its choices")
        return [self._judge(gold, choices, text) for text in request.completions]

    def _judge(self, gold: str, choices: Mapping[str, str], completion: str) -> Verdict:
        answer = judged_text(completion, self.scope)
        if answer is None:
            return Verdict.scored(0.0, reason="no single <answer>...</answer>")
        choice = picked(answer, choices)
        if choice is None:
            return Verdict.scored(0.0, reason="names no choice, or several")
        return Verdict.scored(1.0 if choice == gold else 0.0, reason="" if choice == gold else f"chose {choice}")


def picked(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter that `text` chooses; None for none or several. `choices`: letter -> text, empty if not known."""
    text = text.strip()[:10_000]
    by_text = {_fold(choice): letter for letter, choice in choices.items()}
    if (letter := by_text.get(_fold(text))) is not None and list(map(_fold, choices.values())).count(_fold(text)) == 1:
        return letter
    if match := _LONE.fullmatch(text):
        return _existing(match[1].upper(), choices)
    said = set(_SAID.findall(text))
    if match := _LED.fullmatch(text):
        said.add(match[1])
        said |= {letter for letter in re.findall(r"\b([A-Z])\b", match[2]) if letter not in "AI"}
    return _existing(said.pop(), choices) if len(said) == 1 else None


def _existing(letter: str, choices: Mapping[str, str]) -> str | None:
    return letter if not choices or letter in choices else None


def _choices(column: Any, prompt: str) -> dict[str, str]:
    if isinstance(column, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in column.items()}
    if isinstance(column, Sequence) and not isinstance(column, str):
        return {chr(ord("A") + i): str(text) for i, text in enumerate(column[:26])}
    found = _LISTED.findall(prompt)
    letters = [letter for letter, _ in found]
    return dict(found) if len(set(letters)) == len(letters) > 1 else {}


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")
