"""Golds are scored against themselves before a run: what does not get full marks stops it, with examples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from rollout.data.source import PromptSource
from saccade.checks import gold_check
from saccade.checks.gold_check import gold_problems
from saccade.commands.check_data import check_data
from saccade.commands.inspect_data import PlainText
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import data_options
from saccade.config.run_config import RunConfig
from saccade.preflight import resolve
from tests.helpers.data_helpers import png, write_rows
from vlm.adapter import MultimodalAdapter

FORMAT = {"name": "format"}
SOLUTION = "First we add 3 and 4, which makes $7$. Then we double it. That gives $14$ in the end."
CALL = '{"name": "zoom", "arguments": {"x": 1}}'
GOLDS = ("3", "1/2", "red", "x^2+1", "3 cm", "12:30", "(1, 2)", "[1, 2]", "B", "a < b", "50%", '["x", null]', "A or B")


def configured(files: Sequence[Path], *functions: Any, **changes: Any) -> RunConfig:
    data = {"train": [str(file) for file in files], **changes.pop("data", {})}
    reward = {"functions": list(functions), **changes.pop("reward", {})}
    learner = {"prompts_per_step": 2}
    tree = {"output_dir": str(files[0].parent / "run"), "steps": 1, "data": data, "reward": reward, "learner": learner}
    return parse_config({"model": {"path": "none"}, **tree, **changes})


def problems(config: RunConfig) -> list[str]:
    source = PromptSource(data_options(config, config.data.train), cast("MultimodalAdapter", PlainText()))
    return gold_problems(config, "data.train", source)


def asked(folder: Path, rows: Sequence[Any], *functions: Any, **changes: Any) -> list[str]:
    """The problems of rows, or of golds, under rewards."""
    given = [row if isinstance(row, dict) and "prompt" in row else {"prompt": "q", "answer": row} for row in rows]
    return problems(configured([write_rows(folder / "a.jsonl", given)], *functions, **changes))


@pytest.mark.parametrize("scope", ["answer", "completion"])
@pytest.mark.parametrize("form", [None, "strict", "newline"])
@pytest.mark.parametrize("name", ["accuracy", "exact_match", "contains", "edit_distance"])
def test_good_golds_get_full_marks_in_any_scope_and_format(
    tmp_path: Path, scope: str, form: str | None, name: str
) -> None:
    functions = [{"name": name, "options": {"scope": scope}}]
    if form is not None:
        functions.append({"name": "format", "options": {"style": form}})
    found = asked(tmp_path, GOLDS, *functions)
    stripped = [
        {**f, "options": {**f["options"], "trace": "stripped"}} if f["name"] == "format" else f for f in functions
    ]
    if scope == "completion" and name in ("exact_match", "edit_distance") and form:  # the format is what they compare
        assert "for 13 of 13 golds checked" in found[0]
    else:
        assert found == asked(tmp_path, GOLDS, *stripped) == []


@pytest.mark.parametrize("scope", ["answer", "completion"])
def test_choices_counts_and_calls(tmp_path: Path, scope: str) -> None:
    choice = {"name": "multiple_choice", "options": {"scope": scope}}
    question = "Which?\nA. red\nB. blue"
    rows = [{"prompt": question, "answer": gold} for gold in ("A", "(B)", "blue", ["E", "A"])]
    assert asked(tmp_path, rows, FORMAT, choice) == []
    assert (
        asked(tmp_path, [3, "twelve", "1,200", ["many", "4"]], {"name": "counting", "options": {"scope": scope}}) == []
    )
    assert asked(tmp_path, [CALL, f"[{CALL}, {CALL}]", "[]"], FORMAT, "tool_call") == []


BOX, OTHER = [10, 20, 300.5, 400], [0, 0, 57, 999]


def boxed(coordinates: str, **options: Any) -> dict[str, Any]:
    return {"name": "grounding", "options": {"coordinates": coordinates, **options}}


@pytest.mark.parametrize("scope", ["answer", "completion"])
@pytest.mark.parametrize("coordinates", ["absolute", "normalized", "thousandths"])
def test_boxes_have_full_marks_for_themselves(tmp_path: Path, coordinates: str, scope: str) -> None:
    """In pixels too, although no image is read."""
    one = [BOX, {"bbox_2d": OTHER, "label": "a Cat"}, {"bbox": [57, 113, 211, 613]}, [BOX]]
    several = [[BOX, OTHER], [{"bbox_2d": BOX, "label": "cat"}, {"bbox_2d": OTHER, "label": "dog"}], [], [BOX]]
    for gold_coordinates in ("absolute", "thousandths"):
        given = {"gold_coordinates": gold_coordinates, "scope": scope}
        for metric, golds in (("iou", one), ("giou", one), ("point", one), ("boxes", several)):
            function = boxed(coordinates, metric=metric, **given)
            assert asked(tmp_path, golds, *([FORMAT] if scope == "answer" else []), function) == []
    rows = [{"prompt": "q", "boxes": box} for box in ([BOX], [OTHER])]
    function = boxed(coordinates, gold_coordinates="absolute", column="boxes", threshold=0.5)
    assert asked(tmp_path, rows, function) == []


@pytest.mark.parametrize(
    ("gold", "options", "said"),
    [
        (BOX, {"gold_coordinates": "normalized"}, "unscorable: the row's answer is not a single box"),
        ([BOX, OTHER], {}, "unscorable: the row's answer is not a single box"),
        ([300, 20, 10, 400], {"metric": "boxes"}, "unscorable: the row's answer is not a list of boxes"),
        ([5, 5], {}, "0: "),  # a point has no IoU
        ("red", {}, "unscorable: the row's answer is not a single box"),
        ({"box": BOX, "bbox_2d": BOX}, {}, "unscorable: the row's answer is not a single box"),
    ],
)
def test_what_is_no_box_stops_a_run(tmp_path: Path, gold: Any, options: dict[str, Any], said: str) -> None:
    (problem,) = asked(tmp_path, [gold] * 3, boxed("thousandths", **options))
    assert "the reward 'grounding' gives the gold answer itself less than full marks for 3 of 3" in problem
    assert said in problem
    rows = [{"prompt": "q", "boxes": gold}] * 3
    in_column = boxed("thousandths", column="boxes", **options)
    (problem,) = asked(tmp_path, rows, in_column)
    assert said.replace("answer", "boxes") in problem and "gold None" not in problem and " empty" not in problem


@pytest.mark.parametrize(
    ("golds", "function", "said"),
    [
        ([SOLUTION] * 3, "accuracy", "unscorable: the row's answer is a whole solution"),
        ([{"style": "rule", "value": "4"}] * 3, "accuracy", "the row's answer is a struct"),
        (["3 dogs"], "counting", "gold '3 dogs': unscorable: the row's answer '3 dogs' is not a whole number"),
        (["E"], "multiple_choice", "gold 'E': unscorable: the row's answer 'E' is not one of its choices"),
        (["one two three"], {"name": "contains", "options": {"max_words": 2}}, "0: longer than 2 words"),
        (["red"], "tool_call", "the row's answer holds no tool calls"),
        ([CALL], {"name": "tool_call", "options": {"tools": [{"name": "turn"}]}}, "0: there is no tool 'zoom'"),
        (["x" * 30_000], "edit_distance", "0: longer than 20000 characters"),
        (["see </answer>"], "exact_match", "0: no single <answer>"),
    ],
)
def test_golds_that_are_no_answers_stop_a_run(tmp_path: Path, golds: list[Any], function: Any, said: str) -> None:
    rows = [{"prompt": "Which?\nA. red\nB. blue", "answer": gold} for gold in golds]
    (problem,) = asked(tmp_path, rows, FORMAT, function)
    name = function if isinstance(function, str) else function["name"]
    first, *examples, last = problem.splitlines()
    assert f"data.train: the reward {name!r} gives the gold answer itself less than full marks" in first
    assert f"for {len(golds)} of {len(golds)} golds checked" in first
    assert len(examples) == len(golds) and said in examples[0] and "a.jsonl:" in examples[0]
    assert "reward.check_golds=false" in last
    assert max(map(len, problem.splitlines())) < 400
    assert asked(tmp_path, rows, FORMAT, function, reward={"check_golds": False}) == []
    recorded = {"name": function, "weight": 0} if isinstance(function, str) else {**function, "weight": 0}
    assert asked(tmp_path, rows, FORMAT, recorded) == []


def test_refused_answers_are_counted_too(tmp_path: Path) -> None:
    (problem,) = asked(tmp_path, ["\\boxed{1}, so else \\boxed{2}", None, "3"], "accuracy")
    assert "no answer can be read from 2 of 3 golds checked (1 of 1 " in problem
    assert "marks 2 answers, '1' and '2'; name a column" in problem


def test_single_faults_are_within_the_share_that_may_be_refused_but_a_kind_of_gold_is_not(tmp_path: Path) -> None:
    good = ["7"] * 200
    assert asked(tmp_path, [*good, SOLUTION], "accuracy") == []
    assert asked(tmp_path, ["7"] * 79 + ["red", "blue"], "counting") == []  # chance, where one in 100 may
    few = [f"{n} dogs" for n in range(5)]
    (problem,) = asked(tmp_path, [*good, *few], "counting")
    assert "for 5 of 205 golds checked (5 of 5 quantity)" in problem
    assert asked(tmp_path, ["7"] * 8 + ["red"], "counting", data={"max_refused_share": 0.2}) == []


def test_some_rows_of_every_file_are_looked_at_and_no_media(tmp_path: Path) -> None:
    """The images do not exist."""
    rows = [{"prompt": "q", "image": "gone.png", "answer": n} for n in range(1000)]
    large = write_rows(tmp_path / "large.parquet", rows)
    small = write_rows(tmp_path / "small.parquet", [{"prompt": "q", "image": "gone.png", "answer": SOLUTION}] * 5)
    (problem,) = problems(configured([large, small], "accuracy"))
    assert "for 5 of 133 golds checked" in problem
    assert "small.parquet:0" in problem and "large" not in problem


def test_it_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(gold_check.time, "monotonic", lambda: next(seconds))
    (problem,) = asked(tmp_path, [SOLUTION] * 100, "accuracy")
    assert "for 3 of 3 golds checked" in problem


def test_a_run_and_a_check_of_data_stop(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"problem": "q", "images": [png()], "solution": SOLUTION} for _ in range(4)]
    files = [write_rows(tmp_path / "a.parquet", rows)]
    model = {"model": {"path": str(tiny_model)}, "rollout": {"max_completion_length": 12}}
    changes = {**model, "data": {"max_prompt_length": 256}}
    config = configured(files, "accuracy", **changes)
    with pytest.raises(ConfigError, match="the reward 'accuracy' gives the gold answer itself less than full marks"):
        resolve(config)
    out = io.StringIO()
    assert not check_data(config, None, Console(file=out, width=200))
    assert "4 of 4 golds checked" in out.getvalue()
    unchecked = configured(files, "accuracy", **changes, reward={"check_golds": False})
    resolve(unchecked)
    assert check_data(unchecked, None, Console(file=io.StringIO()))
