"""Rows become prompts: images placed, bad rows refused with file, row and reason, and a cursor that loses nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.data.config import SYSTEM_PROMPTS
from rollout.data.rows import content_mark
from rollout.data.source import DataError, PromptSource
from rollout.types import Prompt, PromptRef
from tests.helpers.data_helpers import FakeTextAdapter, fake_adapter, png, source, write_rows
from vlm.media.types import Media

FOLDER_IS_SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def image_part(**extra: Any) -> dict[str, Any]:
    return {"type": "image", **extra}


def text_part(text: str, **extra: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **extra}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if content and isinstance(content[0], str) else list(content)}


def only(folder: Path, row: dict[str, Any], suffix: str = ".parquet", **given: Any) -> Prompt:
    (prompt,) = source(write_rows(folder / f"data{suffix}", [row]), **given).take(1)
    return prompt


def refusal(folder: Path, row: dict[str, Any], suffix: str = ".parquet", **data: Any) -> tuple[str, str]:
    """Kind and reason for which `row` is refused."""
    opened = source(write_rows(folder / f"data{suffix}", [row]), max_refused_share=1.0, **data)
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        opened.take(1)
    report = opened.report()
    assert (report.rows, report.seen, report.refused_total) == (1, 1, 1)
    (first,) = report.first_refusals
    assert str(first).startswith(f"{folder / f'data{suffix}'} row 0: ")
    assert report.refused == {first.kind: 1}
    return first.kind, first.reason


# ---------------------------------------------------------------------- what a prompt holds


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    image = png("red", (56, 30))
    row = {"prompt": "What colour?", "image": {"bytes": image, "path": None}, "answer": "red", "level": 3}
    prompt = only(tmp_path, row, options={"extra_columns": ("level",)}, system_prompt="Be brief.")
    assert prompt.ref == PromptRef("data.parquet:0", 0, 0, 0)
    assert prompt.text == "system:Be brief.\nuser:<img>What colour?\nassistant:"
    assert prompt.token_ids.dtype == np.int32
    assert len(prompt.token_ids) == len(prompt.text) - len("<img>") + 1
    assert prompt.expanded_length == len(prompt.token_ids) - 1 + 4  # 56 x 30: two by two squares
    (media,) = prompt.media
    assert (media.kind, media.width, media.height, media.data) == ("image", 56, 30, image)
    assert media.digest == hashlib.sha256(image).hexdigest()
    assert (prompt.answer, prompt.columns) == ("red", {"level": 3})
    assert prompt.user_text == "What colour?", "for rewards: neither rendered nor with the template around it"


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: [b, b], lambda b: [{"bytes": b, "path": "x.png"}] * 2])
def test_images_come_as_bytes_structs_and_lists(tmp_path: Path, wrap: Any) -> None:
    value = wrap(png())
    prompt = only(tmp_path, {"prompt": "q", "image": value, "answer": "a"})
    count = len(value) if isinstance(value, list) else 1
    assert prompt.text == f"user:{'<img>' * count}q\nassistant:"
    assert [m.data for m in prompt.media] == [png()] * count


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_image_paths_start_at_the_data_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png("blue"))
    for image in ("pictures/a.png", str(tmp_path / "pictures" / "a.png"), {"path": "pictures/a.png"}):
        prompt = only(tmp_path, {"prompt": "q", "image": image, "answer": "a"}, suffix)
        assert prompt.media[0].data == png("blue")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_chat_messages_place_their_images(tmp_path: Path, suffix: str) -> None:
    """Parquet gives every part every key, null where it has none; templates must not see those."""
    (tmp_path / "a.png").write_bytes(png())
    messages = [
        {"role": "system", "content": [text_part("own system")]},
        user(text_part("first"), image_part()),
        {"role": "assistant", "content": [text_part("<think>yes")]},
        user(image_part(), text_part("then")),
    ]
    row = {"prompt": messages, "image": ["a.png", "a.png"], "answer": "a"}
    prompt = only(tmp_path, row, suffix, system_prompt="think_answer")
    expected = "system:own system\nuser:first<img>\nassistant:<think>yes\nuser:<img>then\nassistant:"
    assert prompt.text == expected and prompt.user_text == "first\nthen"


def test_chat_with_plain_contents_gets_its_image_before_the_user_text(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, user("q")]
    assert (
        only(tmp_path, {"prompt": messages, "image": png(), "answer": "a"}).text == "system:s\nuser:<img>q\nassistant:"
    )


def test_the_shipped_system_prompt_is_selected_by_its_word(tmp_path: Path) -> None:
    text = only(tmp_path, {"prompt": "q"}, system_prompt="think_answer").text
    assert SYSTEM_PROMPTS["think_answer"] in text
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in text


def test_text_models_get_plain_contents(tmp_path: Path) -> None:
    row = {"prompt": [user(text_part("a"), text_part("b"))], "answer": "a"}
    assert only(tmp_path, row, adapter=FakeTextAdapter()).text == "user:ab\nassistant:"


def test_rows_without_an_image_are_text_prompts(tmp_path: Path) -> None:
    for value in (None, []):
        prompt = only(tmp_path, {"prompt": "q", "image": value, "answer": "a"}, ".jsonl")
        assert (prompt.media, prompt.text) == ((), "user:q\nassistant:")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x", "x"),
        (4, "4"),
        (0, "0"),
        (2.5, "2.5"),
        (Decimal("1.50"), "1.50"),
        ([12, 30], "[12, 30]"),
        ({"box": [1, 2], "name": "é"}, '{"box": [1, 2], "name": "é"}'),
        ("<answer> 3 </answer>", "3"),
        ("\n<answer>a\nb</answer> ", "a\nb"),
        ("<think>x</think>\n\n<answer>B</answer>", "B"),
        (["x", None], '["x"]'),
        ([], "[]"),
    ],
)
def test_answers_are_texts_numbers_or_json(tmp_path: Path, answer: Any, expected: str) -> None:
    assert only(tmp_path, {"prompt": "q", "answer": answer}).answer == expected


# ---------------------------------------------------------------------- what is refused

GOOD = {"prompt": "q", "image": png(), "answer": "a"}


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"image": b"no image"}, "bad image", "image 0: not a readable image"),
        ({"image": png()[:60]}, "bad image", "not a readable image"),
        ({"image": [png(), b"\x00"]}, "bad image", "image 1: not a readable image"),
        ({"image": [png(), None]}, "missing image", "image 1: expected bytes"),
        ({"image": "gone.png"}, "missing image", "image 0: no file"),
        ({"image": {"bytes": None, "path": None}}, "missing image", "neither 'bytes' nor 'path'"),
        ({"image": {"bytes": "aGk=", "path": None}}, "bad image", "image 0: not a readable image"),
        ({"image": {"bytes": "no/text!", "path": None}}, "bad image", "not readable as base64 text"),
        ({"image": {"bytes": 7, "path": None}}, "bad image", "'bytes' holds int"),
        ({"image": "https://example.org/a.png"}, "URL refused", "is a URL; download the file"),
        ({"image": "data:image/png;base64,aGk="}, "bad image", "image 0: not a readable image"),
        ({"image": "data:image/png;base64,a%20Gk="}, "bad image", "not readable as base64 text"),
        ({"image": "data:,hello"}, "URL refused", "is a data URL; data URLs must be base64"),
        ({"image": "a" * 100_000}, "missing image", "is neither a path nor base64 text of a known format (100,000"),
        ({"image": "a? " * 100_000}, "missing image", "is a text of 300,000 characters, not a path"),
        ({"image": base64.b64encode(png(size=(400, 300))).decode()}, "image too large", "120,000 pixels"),
        ({"image": base64.b64encode(png() + b"\x00" * 42_000).decode()}, "image too large", "the limit is 41,943"),
        ({"image": 7}, "bad image", "found int"),
        ({"image": png(size=(400, 300))}, "image too large", "120,000 pixels, the limit is 100,000"),
        ({"image": png() + b"\x00" * 42_000}, "image too large", "bytes, the limit is 41,943"),
        ({"image": png(size=(804, 4))}, "bad shape", "the model's processor refuses 804 x 4: absolute aspect"),
        ({"image": [png()] * 9}, "image count", "9 images, the limit is 8"),
        ({"answer": None}, "no answer", "the row has no answer"),
        ({"answer": " "}, "no answer", "the row has no answer"),
        ({"answer": float("nan")}, "no answer", "the row has no answer"),
        ({"answer": b"a"}, "bad answer", "a text, a number, a list or a struct, found bytes"),
        ({"answer": [b"a"]}, "bad answer", "cannot be written as JSON"),
        ({"answer": "<answer> </answer>"}, "no answer", "the row has no answer"),
        ({"answer": [None, ""]}, "no answer", "column 'answer': the row has no answer"),
        ({"answer": "<think>x</think>"}, "no answer", "thoughts without an answer after </think>: '<think>x'"),
        ({"answer": "<answer>1</answer> or <answer>2</answer>"}, "bad answer", "marks 2 answers, '1' and '2'; name a"),
        ({"answer": {"style": "rule", "ground_truth": "4"}}, "bad answer", "data.columns.answer=answer.ground_truth"),
        ({"prompt": None}, "bad prompt", "found nothing"),
        ({"prompt": 3}, "bad prompt", "found int"),
        ({"prompt": ""}, "bad prompt", "the prompt is empty"),
        ({"prompt": "  ", "image": None}, "bad prompt", "the prompt is empty"),
        ({"prompt": [user(text_part(" "))], "image": None}, "bad prompt", "the user's messages are empty"),
        ({"prompt": "see <img>"}, "placeholder in text", "the model's own <img>"),
        ({"prompt": "see </img>"}, "placeholder in text", "the model's own </img>"),
        ({"prompt": [user(image_part(), text_part("<im"), text_part("g>"))]}, "placeholder in text", "own <img>"),
        ({"prompt": "long " * 200}, "prompt too long", "the limit is 300 (data.max_prompt_length)"),
        ({"image": png(size=(310, 310))}, "prompt too long", "161 tokens"),
        ({"prompt": [user(text_part("q"))]}, "image count", "0 place(s) for images, but the row has 1 image(s)"),
        ({"prompt": [user(image_part(), image_part(), text_part("q"))]}, "image count", "2 place(s) for"),
        ({"prompt": [user(image_part(), text_part("q"))], "image": None}, "image count", "1 place(s) for"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "b"}, user("c")]}, "image count", "0 place(s) for"),
        ({"prompt": "<image> or <image>"}, "image count", "2 place(s) for images, but the row has 1 image(s)"),
        ({"prompt": "<image>", "image": None}, "image count", "1 place(s) for images, but the row has 0 image(s)"),
        ({"prompt": "<image> and <video>"}, "video count", "1 place(s) for videos, but the row has 0 video(s)"),
        ({"prompt": "a <im<image>g>"}, "placeholder in text", "the model's own <img>"),
        ({"prompt": [{"from": "robot", "value": "q"}]}, "bad prompt", "found 'robot'"),
        ({"prompt": [{"from": ["human"], "value": "q"}]}, "bad prompt", "found ['human']"),
        ({"prompt": [{"from": "human", "value": None}]}, "bad prompt", "content is NoneType"),
        ({"prompt": [user("q"), {"role": "assistant", "content": "a"}]}, "bad prompt", "it must be the user's"),
        ({"prompt": [{"role": "bot", "content": "q"}]}, "bad prompt", "message 0: expected {role, content}"),
        ({"prompt": [{"role": "user", "content": None}]}, "bad prompt", "content is NoneType"),
        ({"prompt": [user(image_part(image="a.png"))]}, "bad prompt", "comes from the image column"),
        ({"prompt": [user({"type": "image_url", "image_url": "http://x"})]}, "bad prompt", "a part must be"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], kind: str, reason: str
) -> None:
    if reason.startswith("161"):
        monkeypatch.setitem(LIMITS, "max_prompt_length", 160)  # "user:", "q\nassistant:" are 17, 12 x 12 squares 144
    found = refusal(tmp_path, GOOD | change, **LIMITS)
    assert found[0] == kind and len(found[1]) < 300
    assert reason in found[1]


LIMITS: dict[str, Any] = {"max_media_bytes": 41_943, "max_prompt_length": 300}  # up to 100,000 pixels


def test_jsonl_rows_are_refused_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "q", "answer": "a"}\nnot json\n{"answer": "a"}\n{"prompt": "\\ud800", "answer": "a"}\n')
    data = source(path, max_refused_share=1.0)
    assert [p.ref.row for p in data.one_epoch()] == [0]
    assert data.report().refused == {"unreadable row": 1, "bad prompt": 2}
    assert sorted(r.row for r in data.report().first_refusals) == [1, 2, 3]


def test_a_template_that_fails_or_drops_text_refuses_the_row(tmp_path: Path) -> None:
    class Fails(FakeTextAdapter):
        def render(self, messages: Any) -> str:
            raise KeyError("tools")

    class Drops(FakeTextAdapter):
        def render(self, messages: Any) -> str:
            return "assistant:"

    row = {"prompt": "q"}
    assert "chat template or tokenizer refuses the prompt: 'tools'" in refusal(tmp_path, row, adapter=Fails())[1]
    assert "drops or changes text of the user" in refusal(tmp_path, row, adapter=Drops())[1]


def test_images_for_a_text_model_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD, adapter=FakeTextAdapter()) == (
        "image count",
        "1 image(s), but the model takes none",
    )


def test_refused_rows_are_passed_over_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "answer": None if n % 100 == 7 else "a"} for n in range(1000)]
    data = source(write_rows(tmp_path / "a.parquet", rows), max_refused_share=0.01)
    rows_taken = [p.ref.row for p in data.take(990)]
    assert sorted(rows_taken) == [n for n in range(1000) if n % 100 != 7]
    assert data.report().refused == {"no answer": 10}
    assert str(data.report()) == "10 of 1000 rows refused: 10 no answer"


def test_too_many_refused_rows_stop_with_the_first_of_them(tmp_path: Path) -> None:
    rows = [{"prompt": "q" if n % 2 else None, "answer": None if n % 50 == 7 else "a"} for n in range(2000)]
    data = source(write_rows(tmp_path / "a.parquet", rows), max_refused_share=0.1, shuffle=False)
    with pytest.raises(DataError) as caught:
        data.take(2000)
    message = str(caught.value)
    assert "more than 10.00% of the rows were refused (data.max_refused_share). 101 of" in message
    assert f"{tmp_path / 'a.parquet'} row 0: expected a text or a list of chat messages, found nothing" in message
    assert f"{tmp_path / 'a.parquet'} row 7: column 'answer': the row has no answer" in message
    assert message.count("a.parquet row ") == 10
    with pytest.raises(DataError, match=r"more than 10\.00%"):
        data.take(1)  # and it stays so


def test_a_row_refused_in_every_epoch_counts_once(tmp_path: Path) -> None:
    rows = [{"prompt": None if n == 0 else "q"} for n in range(20)]
    data = source(write_rows(tmp_path / "a.parquet", rows), max_refused_share=0.05)
    assert len(data.take(200)) == 200
    assert data.report().refused == {"bad prompt": 1}
    assert len(data.report().first_refusals) == 1


def test_one_bad_row_of_many_is_no_reason_to_stop_early(tmp_path: Path) -> None:
    rows = [{"prompt": None if n == 0 else "q"} for n in range(200)]
    data = source(write_rows(tmp_path / "a.parquet", rows), shuffle=False)
    assert len(data.take(199)) == 199  # 1 of the first 1 refused, but 1 of 200 in all
    strict = source(tmp_path / "a.parquet", shuffle=False, max_refused_share=0.0)
    with pytest.raises(DataError, match=r"more than 0\.00%"):
        strict.take(1)


# ---------------------------------------------------------------------- order and cursor


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files, 17 rows; rows 3 and 12 are refused."""
    folder = tmp_path_factory.mktemp("numbered")
    rows = [{"prompt": None if n in (3, 12) else f"row {n}"} for n in range(17)]
    return [
        write_rows(folder / "a.parquet", rows[:6], row_group_size=2),
        write_rows(folder / "b.jsonl", rows[6:13]),
        write_rows(folder / "c.parquet", rows[13:]),
    ]


def open_numbered(files: list[Path], shuffle: bool = True, **options: Any) -> PromptSource:
    return source(*files, max_refused_share=1.0, shuffle=shuffle, options=options)


def identity(prompts: list[Prompt]) -> list[tuple[str, int, str]]:
    return [(p.ref.uid, p.ref.epoch, p.text) for p in prompts]


@given(st.lists(st.integers(0, 9), max_size=12), st.data(), st.booleans(), st.sampled_from([1, 200, 2**20]))
def test_any_split_of_takes_and_resumes_gives_the_same_sequence(
    numbered: list[Path], takes: list[int], data: st.DataObject, shuffle: bool, window: int
) -> None:
    expected = identity(open_numbered(numbered, shuffle, window_bytes=window).take(sum(takes)))
    current, got = open_numbered(numbered, shuffle, window_bytes=window), []
    for n in takes:
        got += identity(current.take(n))
        if data.draw(st.booleans()):
            state = json.loads(json.dumps(current.state()))
            current = open_numbered(numbered, shuffle, window_bytes=window)
            current.load_state(state)
    assert got == expected


@given(st.integers(0, 100), st.sampled_from([1, 200, 2**20]))
def test_every_usable_row_once_per_epoch(numbered: list[Path], seed: int, window: int) -> None:
    prompts = open_numbered(numbered, seed=seed, window_bytes=window).take(3 * 15)
    usable = sorted(set(range(17)) - {3, 12})
    for epoch in range(3):
        assert sorted(p.ref.row for p in prompts if p.ref.epoch == epoch) == usable
    assert all(count == 3 for count in Counter(p.ref.uid for p in prompts).values())
    orders = {tuple(p.ref.row for p in prompts if p.ref.epoch == epoch) for epoch in range(3)}
    assert len(orders) > 1


def test_uids_name_file_and_row(numbered: list[Path]) -> None:
    prompts = open_numbered(numbered, shuffle=False).take(15)
    assert [p.ref.uid for p in prompts][:7] == [*(f"a.parquet:{n}" for n in (0, 1, 2, 4, 5)), "b.jsonl:0", "b.jsonl:1"]
    assert [p.ref.row for p in prompts] == [n for n in range(17) if n not in (3, 12)]
    assert all(p.text == f"user:row {p.ref.row}\nassistant:" for p in prompts)


def test_prompts_are_read_again_by_reference(numbered: list[Path]) -> None:
    data = open_numbered(numbered)
    taken = data.take(20)
    before = data.state()
    refs = [p.ref.retry() for p in reversed(taken)]
    again = open_numbered(numbered).read(refs)
    assert [p.ref for p in again] == refs
    assert [p.text for p in again] == [p.text for p in reversed(taken)]
    data.read(refs)
    assert data.state() == before


def test_reading_again_what_is_not_there_is_an_error(numbered: list[Path]) -> None:
    data = open_numbered(numbered)
    with pytest.raises(DataError, match=r"row 6 is b\.jsonl:0, not a\.parquet:6"):
        data.read([PromptRef("a.parquet:6", row=6)])
    with pytest.raises(DataError, match="there is no row 17: the data have 17 rows"):
        data.read([PromptRef("c.parquet:4", row=17)])
    with pytest.raises(DataError, match=r"a\.parquet:3 .* cannot be read again: expected a text"):
        data.read([PromptRef("a.parquet:3", row=3)])


def test_a_cursor_of_other_data_is_refused(numbered: list[Path]) -> None:
    state = open_numbered(numbered).state()
    with pytest.raises(DataError, match="seed: it was 0, now 1"):
        open_numbered(numbered, seed=1).load_state(state)
    files = (
        r"they were a\.parquet with 6 rows, b\.jsonl with 7 rows, c\.parquet with 4 rows, now a\.parquet with 6 rows"
    )
    with pytest.raises(
        DataError,
        match=files + r"\n  - Resume with the data that the run began with. To train on the new data, start a run",
    ):
        open_numbered(numbered[:1]).load_state(state)
    with pytest.raises(DataError, match="order of the rows: other columns"):
        open_numbered(numbered, window_bytes=100).load_state(state)


def test_a_cursor_of_files_that_changed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    state = open_numbered(files).state()
    open_numbered(files).load_state(state)
    files[1].write_text('{"prompt": "one"}\n{"prompt": "six"}\n')
    with pytest.raises(
        DataError, match=r"contents: b\.jsonl changed since, with as many rows as before\n  - Resume with"
    ):
        open_numbered(files).load_state(state)
    # Of a large file pieces are looked at, the last bytes among them.
    monkeypatch.setattr("rollout.data.rows.WHOLE_BYTES", 10)
    monkeypatch.setattr("rollout.data.rows.SAMPLE_BYTES", 2)
    before = content_mark(files[0])
    files[0].write_bytes(files[0].read_bytes()[:-2] + b" \n")
    assert content_mark(files[0]) != before


def test_one_epoch_leaves_the_cursor_alone(numbered: list[Path]) -> None:
    data = open_numbered(numbered, shuffle=False)
    data.take(4)
    before = data.state()
    assert [p.ref.row for p in data.one_epoch(5)] == [0, 1, 2, 4, 5]
    assert len(list(data.one_epoch())) == 15
    assert data.state() == before


# ---------------------------------------------------------------------- construction


def test_missing_files_folders_and_columns_are_reported_at_construction(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"frage": "q", "picture": 1, "answer": "a"}])
    with pytest.raises(DataError) as caught:
        source(path, tmp_path / "b.jsonl", columns={"image": "pictures"}, media_from=(str(tmp_path / "no"),))
    message = str(caught.value)
    assert "4 problem(s)" in message
    assert f"data.media_from: no folder {tmp_path / 'no'}" in message
    assert "b.jsonl: no such file" in message
    assert "a.parquet: no column with a known name for prompts (prompt, problem, " in message
    assert "no column 'pictures' (data.columns.image); it has picture, " in message


def test_a_real_family_refuses_its_placeholders_and_counts_its_tokens(tiny_model: Path, tmp_path: Path) -> None:
    from vlm.families.registry import load_adapter
    from vlm.media.images import open_image

    adapter = load_adapter(str(tiny_model))
    sizes = [(28, 28), (5, 5), (300, 28), (57, 113), (5000, 5)]
    rows = [{"prompt": "What is it?", "image": [png("red", size), png("blue")], "answer": "a"} for size in sizes]
    texts = ["a <|image_pad|> b", "a <|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>"]
    rows += [{"prompt": text, "image": [png()], "answer": "a"} for text in texts]
    data = source(write_rows(tmp_path / "a.parquet", rows), adapter=adapter, shuffle=False, max_refused_share=1.0)
    prompts = data.take(4)
    assert [(p.media[0].width, p.media[0].height) for p in prompts] == sizes[:4]
    for prompt in prompts:
        encoded = adapter.encode(prompt.text, [open_image(m.data) for m in prompt.media])
        assert len(encoded.input_ids) == prompt.expanded_length
    assert len(list(data.one_epoch())) == 4
    assert data.report().refused == {"bad shape": 1, "placeholder in text": 3}


def test_the_fake_family_is_like_a_real_one() -> None:
    adapter = fake_adapter()
    ids = adapter.tokenize("<img>ab<vid>")
    media = [Media("image", "", b"", 28, 28), Media("video", "", b"", 29, 28, frames=(0, 4, 8))]
    assert (len(ids), adapter.media_order(ids)) == (4, ["image", "video"])
    assert adapter.expanded_length(ids, media) == 2 + 1 + 3 * 2
