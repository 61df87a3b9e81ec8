"""Tables of gold, answer and right score, one for each reward that compares texts or counts (tests/data/*.txt)."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rewards.base import ScoringRequest
from rewards.registry import load_reward

DATA = Path(__file__).parents[2] / "data"
ESCAPE = re.compile(r"\\n|\\u([0-9a-f]{4})")


def rows(name: str) -> list[tuple[float | None, str, str, dict[str, Any]]]:
    """Lines `score | gold | answer | options`; `-` for a row that is unscorable."""
    found = []
    for line in (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            score, gold, answer, options = [*(f"{line} ").split(" | "), "", ""][:4]
            given = dict(option.split("=") for option in options.split())
            answer = answer.removesuffix(" ") if not options else answer
            found.append((None if score == "-" else float(Fraction(score)), _text(gold), _text(answer), _typed(given)))
    return found


def _text(written: str) -> str:
    return ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else "\n", written)


def _typed(options: dict[str, str]) -> dict[str, Any]:
    kinds: dict[str, Any] = {
        "case": lambda text: text == "true",
        "graded": lambda text: text == "true",
        "max_words": int,
        "threshold": float,
        "nouns": lambda text: tuple(text.replace("_", " ").split(",")),
    }
    return {name: kinds.get(name, str)(value) for name, value in options.items()}


@pytest.mark.parametrize("name", ["exact_match", "contains", "edit_distance", "counting"])
def test_every_row_of_a_table_gets_its_score(name: str) -> None:
    table = rows(name)
    assert len(table) >= 60
    wrong = []
    for expected, gold, answer, options in table:
        completion = answer if options.get("scope") == "completion" else f"<answer>{answer}</answer>"
        verdict = load_reward(name, options)(ScoringRequest("", (completion,), gold))[0]
        if verdict.score != (None if expected is None else pytest.approx(expected)):
            wrong.append(f"{gold!r} {answer!r} {options}: {verdict.score}, not {expected}")
    assert not wrong, "\n".join(wrong)
