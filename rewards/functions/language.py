"""Language: is the completion in the requested language? py3langid identifies it among 97 languages.

Tags, code, formulas and numbers are removed first. With `think: true`, the trace and the answer are judged separately
and the lower score counts, since models like to think in another language than they answer in.

Failure modes: the language of a few words is uncertain ("red" is taken for Afrikaans). So a completion of fewer than
`letters` letters is `unscorable`, and a row with only such completions teaches nothing: use this reward for tasks with
long answers. Closely related languages (Norwegian and Danish, Serbian and Croatian) are confused. In a mixture, the
language of the larger part wins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from rewards.base import ScoringRequest, unscorable
from rollout.types import Verdict

MAX_CHARACTERS = 20_000
_NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|\$[^$]*\$|</?\w+>|\\[a-zA-Z]+|[0-9_^{}=+*/<>|#]+", re.DOTALL)
_TRACE = re.compile(r"<think>((?:(?!<think>).)*?)</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LanguageReward:
    """Scores 1.0 for the requested language, and 0.0 for another."""

    separable: ClassVar[bool] = True
    language: str | None = None
    """ISO 639-1 code ("en", "zh")."""
    column: str | None = None
    """Column with the language of each row, instead of `language`."""
    letters: int = 30
    """The fewest letters that are judged."""
    think: bool = False

    def __post_init__(self) -> None:
        if (self.language is None) == (self.column is None):
            raise ValueError("give either `language`, a code such as 'en', or the `column` that holds it")
        if self.language is not None:
            _known(self.language)

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        wanted = self.language or request.columns.get(self.column or "")
        if not isinstance(wanted, str) or wanted not in _codes():
            return unscorable(request, f"the row's language {wanted!r:.40} is not a known code, such as 'en'")
        return [self._judge(wanted, text) for text in request.completions]

    def warm_up(self) -> None:
        """Load the model (0.6 s)."""
        _identifier().classify("text")

    def _judge(self, wanted: str, completion: str) -> Verdict:
        text = completion[:MAX_CHARACTERS]
        parts = [*_TRACE.findall(text), _TRACE.sub(" ", text)] if self.think else [text]
        found = [found for part in parts if (found := self._identify(part)) is not None]
        if not found:
            return Verdict("unscorable", reason=f"fewer than {self.letters} letters: too few to identify the language")
        others = sorted({language for language in found if language != wanted})
        return Verdict.scored(0.0 if others else 1.0, reason=f"written in {', '.join(others)}" if others else "")

    def _identify(self, text: str) -> str | None:
        text = _NO_LANGUAGE.sub(" ", text)
        # A character of Chinese or Japanese says as much as a word: one counts as three letters.
        weight = sum(3 if "\u3040" <= c <= "\u9fff" else 1 for c in text if c.isalpha())
        return str(_identifier().classify(text)[0]) if weight >= self.letters else None


def _known(language: str) -> None:
    if language not in _codes():
        raise ValueError(f"language {language!r} is not known; use an ISO 639-1 code, such as 'en' or 'zh'")


@cache
def _codes() -> frozenset[str]:
    return frozenset(code for code, _ in _identifier().rank("text"))


@cache
def _identifier() -> Any:
    """Return py3langid's identifier, imported when first needed."""
    import py3langid

    return py3langid
