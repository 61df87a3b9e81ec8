"""Read the choices of a multiple-choice row: letter -> text. Pure functions.

a column       `["a cat", "a dog"]` (A, B, ... in order), `{"A": "a cat", ..}`, or such a list as JSON or Python text
the question   lines that begin with `A.`, `B)`, `(C)` or `D:`; else such letters within a line, in order from A
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewards.answers.nulls import is_null

MAX_CHARACTERS = 20_000
"""Longest question, and longest column text, that is searched for choices. Of a longer text, the last characters are
searched."""
_LINE = re.compile(r"(?m)^[ \t]*\(?([A-Z])[).:]\s*(\S[^\n]*)$")
_INLINE = re.compile(r"(?:^|(?<=[\s,;]))(?:\(([A-Z])\)|([A-Z])[).:])\s*")


def read_choices(column: Any, question: str) -> dict[str, str]:
    """Return the choices in the column, or else those in the question; empty if there are none."""
    return _of_column(column) or _of_question(question[-MAX_CHARACTERS:])


def _of_column(value: Any) -> dict[str, str]:
    """Read the choices of a column. Nulls, with which tables pad rows, are not choices."""
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, Mapping):
        labels, texts = value.get("label"), value.get("text")
        if isinstance(labels, Sequence) and isinstance(texts, Sequence) and len(labels) == len(texts):
            value = dict(zip(labels, texts, strict=True))  # the columns of ARC, CommonsenseQA, OpenBookQA
        return {str(letter).strip().upper(): str(text) for letter, text in value.items() if not is_null(text)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {chr(ord("A") + i): str(text) for i, text in enumerate(value[:26]) if not is_null(text)}
    return {}


def _literal(text: str) -> Any:
    """Parse a list or a mapping written as JSON or as Python; None for any other text."""
    if len(text) > MAX_CHARACTERS or not text.strip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _of_question(text: str) -> dict[str, str]:
    if listed := _last_run(_LINE.findall(text)):
        return listed
    marks = list(_INLINE.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    texts = (text[mark.end() : end].split("\n")[0].strip(" \t,;") for mark, end in zip(marks, ends, strict=True))
    return _last_run(zip((mark[1] or mark[2] for mark in marks), texts, strict=True))


def _last_run(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the last list of at least two letters in order from A. Examples before the question may have lists of
    their own."""
    last: dict[str, str] = {}
    run: dict[str, str] = {}
    for letter, text in pairs:
        if letter == "A":
            run = {}
        if letter == chr(ord("A") + len(run)):
            run[letter] = text.strip()
            last = run if len(run) > 1 else last
        else:
            run = {}
    return last
