"""Gold forms: which texts a row's answer stands for, and that every reward that compares reads the same ones."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rewards.answers.golds import GoldError, gold_forms, gold_text
from rewards.base import RewardFunction, ScoringRequest
from rewards.config import RewardSpec
from rewards.functions.accuracy import AccuracyReward
from rewards.functions.multiple_choice import MultipleChoiceReward
from rewards.functions.text import ContainsReward, EditDistanceReward, ExactMatchReward
from rewards.functions.tool_call import ToolCallReward
from rewards.registry import answers_are_programs, load_reward
from saccade.config.load import parse_config
from saccade.config.options import data_options
from tests.helpers.data_helpers import source, write_rows


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("red", "red"),
        (3, "3"),
        (2.5, "2.5"),
        # open-r1: reasoning and answer
        ("<answer> 3 </answer>", "3"),
        ("<think>It has two ears.</think>\n\n<answer>B</answer>", "B"),
        ("<think>Is it \\boxed{3}? No.</think> So \\boxed{4}", "4"),
        ("<think>a <answer>C</answer></think><answer>\\boxed{B}</answer>", "B"),
        ("<think>a</think>\nred", "red"),
        ("It is <answer>B</answer>, as <answer> B </answer> says", "B"),
        # a whole solution with a box
        ("Put it in \\boxed{}. So \\boxed{4}", "4"),
        ("We get $2+2=4$, so the answer is $\\boxed{4}$.", "4"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("so \\boxed{1}, \\boxed{2} solve it", "1, 2"),
        ("a fall of $\\boxed{28}\\%$", '["28", "28\\\\%"]'),
        ("\\boxed{4} as I said: \\boxed{4}", "4"),
        # GSM8K, MetaMath
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72", "72"),
        ("#### 2,125", "2,125"),
        ("5 * 2 = 10\n#### 10\nThe answer is: 10", "10"),
        ("#### Solution\nThere are two ways to see it.", "#### Solution\nThere are two ways to see it."),
        ("C#### 3", "C#### 3"),
        # lists of forms, and what is filled into them
        (["x", None], '["x"]'),
        (["x", float("nan")], '["x"]'),
        (["<answer>x</answer>", "\\boxed{y}"], '["x", "y"]'),
        ('["<answer>x</answer>", null]', '["x"]'),
        (["x", "y"], '["x", "y"]'),
        ('["x","y"]', '["x","y"]'),
        ([1, 2], "[1, 2]"),
        ([], "[]"),
        # what other rewards read is left alone
        ({"box": [1, 2]}, '{"box": [1, 2]}'),
        ({"box": [1, float("nan")], "a": None}, '{"box": [1, null], "a": null}'),
        ([{"input": "#### 3", "output": "\\boxed{3}"}], '[{"input": "#### 3", "output": "\\\\boxed{3}"}]'),
        ('[{"code": "#### 3"}]', '[{"code": "#### 3"}]'),
    ],
)
def test_a_value_is_read_as_a_gold(value: object, text: str) -> None:
    assert gold_text(value) == text
    assert gold_text(text) == text  # what was read is read as itself
    assert gold_forms(text) == gold_forms(value if isinstance(value, str) else text)


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        (None, "no answer", "column 'solution': the row has no answer"),
        (float("nan"), "no answer", "the row has no answer"),
        (" ", "no answer", "the row has no answer"),
        ([None, ""], "no answer", "the row has no answer"),
        ("<answer></answer>", "no answer", "the row has no answer"),
        ("<think>hm</think> ", "no answer", "thoughts without an answer after </think>: '<think>hm'"),
        ("<answer>1</answer> or <answer>2</answer>", "bad answer", "marks 2 answers, '1' and '2'; name a column"),
        ("First \\boxed{3}, which gives then \\boxed{4}.", "bad answer", "marks 2 answers, '3' and '4'; name a column"),
        ({"style": "rule", "ground_truth": "4"}, "bad answer", "(style, ground_truth); name its field: data.columns."),
        ({"x" * 5000: 1, "ground_truth": 2}, "bad answer", "name its field: data.columns.answer=solution.ground_truth"),
        ([float("nan")], "no answer", "the row has no answer"),
        ([float("inf")], "bad answer", "cannot be written as JSON"),
        (b"4", "bad answer", "must be a text, a number, a list or a struct, found bytes"),
        ([b"4"], "bad answer", "cannot be written as JSON"),
        ("so \\boxed{%s}, or then \\boxed{b}" % ("a" * 5000), "bad answer", "marks 2 answers"),
        ("%s</think>" % ("a" * 5000), "no answer", "thoughts without an answer"),
    ],
)  # fmt: skip
def test_what_is_no_gold_is_refused_in_a_short_line(value: object, kind: str, reason: str) -> None:
    with pytest.raises(GoldError) as caught:
        gold_text(value, "solution")
    assert caught.value.kind == kind
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 260


CODES = [
    "assert visible('<think>a</think>b') == 'b'",
    "assert f(1) == 2  #### 1",
    "assert f('\\\\boxed{3} \\\\boxed{4}') == 3",
    "x = '<answer>1</answer>'",
    "strip('</think>",
]


@pytest.mark.parametrize("value", [CODES, [*CODES, None], json.dumps([*CODES, None])])
def test_tests_of_programs_stay_as_they_are_written(value: object) -> None:
    text = gold_text(value, as_written=True)
    assert [code for code in json.loads(text) if code is not None] == CODES
    with pytest.raises(GoldError, match=r"thoughts without an answer|marks 2 answers"):
        gold_text(value)
    assert gold_text("so \\boxed{1}, then \\boxed{2}</think>", as_written=True).endswith("</think>")
    for nothing in ("", " ", [None], None):
        with pytest.raises(GoldError, match="the row has no answer"):
            gold_text(nothing, as_written=True)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("code_tests", {"column": None}, True),
        ("code_tests", {}, False),
        ("code_tests", {"column": "tests"}, False),
        ("accuracy", {}, False),
        ("tool_call", {}, False),
    ],
)
def test_only_answers_that_are_programs_are_left_uncut(name: str, options: dict[str, Any], expected: bool) -> None:
    assert answers_are_programs([RewardSpec("format"), RewardSpec(name, options=options)]) == expected


def test_a_run_hands_tests_to_their_reward_uncut_and_texts_cut(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "answer": [CODES[0]]}])
    base = {"output_dir": "run", "steps": 1, "model": {"path": "none"}, "data": {"train": [str(path)]}}
    functions = [{"name": "code_tests", "options": {"column": None}}]
    for given, expected in ((functions, CODES[:1]), ([{"name": "accuracy"}], ["b') == 'b'"])):
        config = parse_config({**base, "reward": {"functions": given}})
        options = data_options(config, config.data.train)
        prompt = source(path, options={"answers_as_written": options.answers_as_written}).attempt(0)
        assert prompt is not None and json.loads(prompt.answer or "") == expected
        assert gold_forms(prompt.answer) == ("b') == 'b'",)  # what a reward of texts beside it compares with


NOT_TEXTS = [
    {"a": 1},
    [{"a": 1}],
    [["a", "b"], ["c"]],
    ["a", ["b"]],
    {"a": float("nan")},
    [[{"a": 1}]],
]


@pytest.mark.parametrize("gold", NOT_TEXTS)
@pytest.mark.parametrize("name", ["accuracy", "multiple_choice", "counting", "grounding", "tool_call"])
def test_a_gold_of_another_kind_is_refused_in_a_short_line(name: str, gold: object) -> None:
    reward = load_reward(name, {"coordinates": "thousandths"} if name == "grounding" else {})
    (verdict,) = reward(ScoringRequest("", ("<answer>a</answer>",), answer=gold_text(gold)))
    assert verdict.status == "unscorable" and verdict.reason.startswith("the row's answer ")
    assert len(verdict.reason) < 160 and "\n" not in verdict.reason


def test_brackets_within_brackets_end_in_a_line_too() -> None:
    """How many are too many depends on what others in the process allow."""
    depth = sys.getrecursionlimit() + 100
    deep = "[" * depth + "1" + "]" * depth
    assert MultipleChoiceReward()(ScoringRequest("", ("<answer>a</answer>",), answer=deep))[0].status == "unscorable"
    value: list[object] = [1]
    for _ in range(depth):
        value = [value]
    with pytest.raises(GoldError, match="cannot be written as JSON"):
        gold_text(value)


@pytest.mark.parametrize("gold", [*NOT_TEXTS, None, float("nan"), [float("nan")], b"x", 3, True, "red", [None]])
@pytest.mark.parametrize("name", ["grounding", "tool_call", "json_schema", "language"])
def test_a_column_of_another_kind_is_refused_in_a_short_line(name: str, gold: object) -> None:
    options = {"coordinates": "thousandths"} if name == "grounding" else {}
    reward = load_reward(name, {**options, "column": "gold"})
    (verdict,) = reward(ScoringRequest("", ("<answer>a</answer>",), columns={"gold": gold}))
    if name == "json_schema" and gold == {"a": 1}:
        return  # no keyword of a schema, and allowed
    assert verdict.status == "unscorable", verdict
    assert len(verdict.reason) < 160 and "\n" not in verdict.reason


def test_json_in_a_fence_is_not_cut() -> None:
    call = '```json\n{"name": "say", "arguments": {"text": "a</think>\\n#### b"}}\n```'
    assert gold_text(call) == call
    assert ToolCallReward()(ScoringRequest("", ("",), answer=gold_text(call)))[0].score == 0.0


@pytest.mark.parametrize("gold", ['{"style": "rule", "value": "40"}', '[{"name": "zoom"}]'])
def test_a_struct_is_no_answer_that_accuracy_compares_with(gold: str) -> None:
    (verdict,) = AccuracyReward()(ScoringRequest("", (f"<answer>{gold}</answer>",), answer=gold))
    assert verdict.status == "unscorable"
    assert "the row's answer is a struct" in verdict.reason


@pytest.mark.parametrize("text", ["```{}x``` is it", "```\n{}x", "```json\n{}x\n``` is it"])
def test_a_fence_with_blank_lines_is_read_at_once(text: str) -> None:
    """It took a minute once, as each blank line might belong to either end of the fence or to what is in it."""
    start = time.process_time()
    long = text.format(" \n" * 2500)
    assert gold_text(long) == long
    assert time.process_time() - start < 20
