"""Gold forms: which texts a row's answer stands for, and that every reward that compares reads the same ones."""

from __future__ import annotations

import pytest

from rewards.accuracy import AccuracyReward
from rewards.base import RewardFunction, ScoringRequest
from rewards.golds import gold_forms
from rewards.text import ContainsReward, EditDistanceReward, ExactMatchReward


@pytest.mark.parametrize(
    ("answer", "forms"),
    [
        ("red", ("red",)),
        ('["1/2", "50 cents"]', ("1/2", "50 cents")),
        ('["x", null]', ("x",)),
        (' [null, "x", null, " "]', ("x",)),
        ('["x", NaN]', ("x",)),
        ('["two", 2, 2.5]', ("two", "2", "2.5")),
        ("[1, 2]", ("[1, 2]",)),
        ("[0, 1)", ("[0, 1)",)),
        ('["x", ["y"]]', ('["x", ["y"]]',)),
        ('["x"', ('["x"',)),
        ("[" * 100_000, ("[" * 100_000,)),
        ("[null, null]", ()),
        ("[]", ()),
        ('["", " "]', ()),
        ("  ", ()),
        (None, ()),
    ],
)
def test_gold_forms(answer: str | None, forms: tuple[str, ...]) -> None:
    assert gold_forms(answer) == forms


@pytest.mark.parametrize("reward", [AccuracyReward(), ExactMatchReward(), ContainsReward(), EditDistanceReward()])
def test_a_null_among_the_gold_forms_is_no_form(reward: RewardFunction) -> None:
    completions = ("<answer>x</answer>", "<answer>7</answer>")
    verdicts = reward(ScoringRequest("", completions, answer='["x", null]'))
    assert [v.score for v in verdicts] == [1.0, 0.0]
    assert reward(ScoringRequest("", completions, answer="[null]"))[0].status == "unscorable"
