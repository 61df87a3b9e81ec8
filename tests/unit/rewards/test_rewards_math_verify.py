"""The pairs of Math-Verify's own tests: the same verdicts, but for a list of disagreements with their reasons."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards.base import ScoringRequest
from rewards.functions.accuracy import AccuracyReward

REASONS = {
    "unit": "What stands behind a number counts: 1/3 meters is not 1/3.",
    "decimal comma": "A comma between digits groups them or separates two answers; it is no decimal point.",
    "boxes apart": "Only boxes side by side are one list; of others the last one counts.",
    "broken": "The text is no well-formed answer: a box that does not end, a command that does not exist.",
    "no one gold": "A gold with boxes apart states no one answer: it is unscorable.",
    "not solved": "Sums and inequalities are not solved: two texts for one solution are two answers.",
    "digits": "Their test rounds to two digits; ours has six.",
    "repeated": "A list that says one value twice is another list.",
    "white space": "A line break inside of dollars does not count.",
    "set": "A set is no pair.",
    "box": "The box counts, whatever the text says after it.",
    "theirs": "1 - 1/e is not 1 + 1/e.",
}
"""Why a verdict of ours is another than theirs."""
LINES = (Path(__file__).parents[2] / "data" / "math_verify_pairs.jsonl").read_text(encoding="utf-8").splitlines()
SOURCE, *PAIRS = map(json.loads, LINES)


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_a_pair_of_math_verify(pair: dict[str, Any]) -> None:
    verdict = AccuracyReward(scope="completion")(ScoringRequest("", (pair["answer"],), pair["gold"]))[0]
    if pair.get("reason") == "no one gold":
        assert verdict.status == "unscorable"
        return
    assert verdict.score == (1 - pair["theirs"] if "reason" in pair else pair["theirs"])


def test_every_disagreement_has_its_reason() -> None:
    assert "Apache-2.0" in SOURCE["source"]
    found = Counter(pair["reason"] for pair in PAIRS if "reason" in pair)
    assert found.keys() == REASONS.keys()
    assert len(PAIRS) == 257 and found.total() == 27
