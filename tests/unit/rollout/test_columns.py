"""Which column plays which role: as named, or by the column's name; never guessed, never silently left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout.data.columns import KNOWN_NAMES, Columns, choose_columns
from rollout.data.source import DataError
from tests.helpers.data_helpers import png, source, write_rows


def choose(*files: str, extra: str = "", **named: str | None) -> Columns | str:
    """The choice for files with these columns, or the problems."""
    problems: list[str] = []
    present = {f"file{n}": columns.split() for n, columns in enumerate(files)}
    chosen = choose_columns(named, extra.split(), present, problems)  # type: ignore[arg-type]
    assert (chosen is None) == bool(problems)
    return chosen if chosen is not None else "\n".join(problems)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("prompt image answer kind", "prompt: prompt, image: image, answer: answer"),
        ("images problem answer", "prompt: problem, image: images, answer: answer"),
        ("image prompt solution", "prompt: prompt, image: image, answer: solution"),
        ("image normal_caption solution", "prompt: normal_caption, image: image, answer: solution"),
        ("id image conversations", "prompt: conversations, image: image, answer: last turn of conversations"),
        ("messages answer", "prompt: messages, answer: answer"),
        ("question video ground_truth", "prompt: question, video: video, answer: ground_truth"),
        ("query audios", "prompt: query, audio: audios"),
    ],
)
def test_roles_are_known_by_names_that_people_use(columns: str, expected: str) -> None:
    assert str(choose(columns)) == expected


def test_a_name_in_the_configuration_goes_before_known_ones_and_null_leaves_a_role_out() -> None:
    columns = choose("prompt question image picture answer", prompt="question", image="picture", answer=None)
    assert str(columns) == "prompt: question, image: picture"
    assert isinstance(columns, Columns)
    assert columns.names == ("question", "picture")


def test_the_prompts_own_column_can_hold_the_answer() -> None:
    columns = choose("conversations solution", answer="conversations")
    assert isinstance(columns, Columns)
    assert (columns.prompt, columns.answer_is_last_turn) == ("conversations", True)
    assert columns.names == ("conversations",)


def test_extra_columns_are_read_and_must_exist() -> None:
    columns = choose("prompt kind level", extra="level kind")
    assert isinstance(columns, Columns)
    assert (columns.names, columns.extra) == (("prompt", "level", "kind"), ("level", "kind"))
    assert (
        choose("prompt knid", extra="kind")
        == "file0: no column 'kind' (asked for by a reward, or data.columns.group); it has knid, prompt"
    )


def test_two_columns_of_one_role_are_a_question_not_a_guess() -> None:
    text = choose("prompt problem image answer solution")
    assert text == (
        "file0: the prompt could be 'prompt' or 'problem'; name one with data.columns.prompt\n"
        "file0: the answer could be 'answer' or 'solution'; name one with data.columns.answer"
    )
    assert str(choose("prompt problem solution answer", prompt="problem", answer="solution")) == (
        "prompt: problem, answer: solution"
    )


def test_what_is_missing_is_said_with_what_there_is() -> None:
    text = choose("caption picture", image="pictures", answer="box")
    assert text == (
        "file0: no column 'pictures' (data.columns.image); it has picture, caption\n"
        "file0: no column 'box' (data.columns.answer); it has caption, picture\n"
        f"file0: no column with a known name for prompts ({', '.join(KNOWN_NAMES['prompt'])}); name it with "
        "data.columns.prompt. It has caption, picture"
    )


def test_many_files_with_one_fault_are_one_problem() -> None:
    text = choose("a b", "b c", "a b", "a b")
    assert isinstance(text, str)
    assert [line.split(":")[0] for line in text.splitlines()] == ["file0 and 2 more", "file1"]


def test_files_of_one_set_must_be_read_alike() -> None:
    text = choose("prompt image", "image prompt other", "prompt images")
    assert isinstance(text, str)
    assert text.startswith(
        "file2: would be read as prompt: prompt, image: images; file0 as prompt: prompt, image: image."
    )
    assert "\n" not in text


def test_a_row_with_a_column_that_was_not_there_before_is_refused(tmp_path: Path) -> None:
    """The keys of the first rows of JSONL stand for all: an image that comes later must not be left out silently."""
    rows: list[dict[str, Any]] = [{"prompt": f"{n}", "image": None} for n in range(1000)]
    rows += [{"prompt": "a", "images": ["a.png"]}, {"prompt": "b", "images": None}, {"prompt": "c", "solution": 1}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    data = source(path, shuffle=False)
    assert [p.ref.row for p in data.one_epoch()] == [*range(1000), 1001]
    assert [(r.row, r.kind) for r in data.report().first_refusals] == [(n, "unexpected column") for n in (1000, 1002)]
    assert "the row has 'images', which the first rows do not have" in data.report().first_refusals[0].reason
    named = source(path, shuffle=False, columns={"image": "image", "answer": None})
    assert len(list(named.one_epoch())) == 1003


def test_what_is_not_used_is_known(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"id": 1, "prompt": "q", "image": png(), "level": 2, "dataset": "d"}])
    assert source(path, options={"extra_columns": ("level",)}).unused == ("id", "dataset")


def test_all_problems_with_a_set_come_at_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"caption": "q"}])
    with pytest.raises(DataError) as caught:
        source(path, tmp_path / "no.json", options={"extra_columns": ("kind",)})
    assert str(caught.value).startswith("3 problem(s) with the data:")
