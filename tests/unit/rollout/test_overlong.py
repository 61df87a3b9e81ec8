"""Prompts that are too long: refused, or, if asked for, shortened where nothing but the user's own words is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rollout.data.builder import largest
from rollout.data.source import DataError
from rollout.types import Prompt
from tests.helpers.data_helpers import PLACES, FakeAdapter, FakeTextAdapter, png, source, write_rows
from vlm.adapter import MultimodalAdapter
from vlm.families.registry import load_adapter
from vlm.media.video_audio import decode
from vlm.tiny import build_tiny

FOLDER_IS_SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
RED = png("red")


class Verbatim(FakeAdapter):
    """A template that leaves every blank where it is."""

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        def content(message: Mapping[str, Any]) -> str:
            return "".join(p["text"] if p["type"] == "text" else PLACES[p["type"]][0] for p in message["content"])

        return "".join(f"{m['role']}:{content(m)}\n" for m in messages) + "assistant:"


def build(path: Path, limit: int, **options: Any) -> Prompt | None:
    """The prompt of the only row, truncated if need be; None if it is refused as too long."""
    options.setdefault("adapter", Verbatim())
    data = source(path, max_prompt_length=limit, overlong_prompts="truncate", max_refused_share=1.0, **options)
    prompt = data.attempt(0)
    report = data.report()
    assert report.truncated == (prompt is not None and prompt.truncated > 0)
    assert report.refused == ({} if prompt is not None else {"prompt too long": 1})
    return prompt


# ---------------------------------------------------------------------- what is lost


def test_the_users_text_loses_its_beginning_and_nothing_else_does(tmp_path: Path) -> None:
    row = {"prompt": "0123456789<image>abcdefghij", "image": png("red", (56, 56))}
    path = write_rows(tmp_path / "a.parquet", [row])
    whole = build(path, 1000, system_prompt="Be brief.")
    assert whole is not None
    assert (whole.text, whole.truncated) == ("system:Be brief.\nuser:0123456789<img>abcdefghij\nassistant:", 0)
    assert whole.expanded_length == len(whole.text) - len("<img>") + 4
    for limit, dropped, left in (
        (whole.expanded_length, 0, "0123456789<img>abcdefghij"),
        (whole.expanded_length - 1, 1, "123456789<img>abcdefghij"),
        (whole.expanded_length - 10, 10, "<img>abcdefghij"),
        (whole.expanded_length - 12, 12, "<img>cdefghij"),
        (whole.expanded_length - 19, 19, "<img>j"),
    ):
        prompt = build(path, limit, system_prompt="Be brief.")
        assert prompt is not None
        assert (prompt.text, prompt.truncated) == (f"system:Be brief.\nuser:{left}\nassistant:", dropped)
        assert prompt.expanded_length == limit
        assert prompt.media == whole.media
    assert build(path, whole.expanded_length - 20, system_prompt="Be brief.") is None


def test_the_template_and_turns_of_others_stay(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "system text"},
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
    ]
    path = write_rows(tmp_path / "a.parquet", [{"prompt": messages}])
    template = "Think. {prompt} Now answer."
    whole = build(path, 1000, prompt_template=template)
    assert whole is not None
    prompt = build(path, whole.expanded_length - 20, prompt_template=template)
    assert prompt is not None
    assert prompt.text == (
        "system:system text\nuser:\nassistant:first answer\nuser:Think.  question Now answer.\nassistant:"
    )


TEXTS = st.text(st.sampled_from("ab <>é漢\n"), max_size=12)
PARTS = st.lists(st.one_of(st.just({"type": "image"}), TEXTS.map(lambda t: {"type": "text", "text": t})), max_size=5)


@FOLDER_IS_SHARED
@given(st.lists(PARTS, min_size=1, max_size=3), TEXTS, st.integers(1, 120))
def test_whatever_the_conversation_only_the_users_words_are_lost_and_as_few_as_will_do(
    tmp_path: Path, turns: list[list[dict[str, Any]]], answer: str, limit: int
) -> None:
    said = "".join(part.get("text", "") for content in turns for part in content)
    images = sum(part["type"] == "image" for content in turns for part in content)
    assume(said.strip() and images <= 8)
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    messages = [message for content in turns for message in ({"role": "user", "content": content}, assistant)][:-1]
    (tmp_path / "a.png").write_bytes(RED)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": messages, "images": ["a.png"] * images}])

    def rendered(keep: int) -> str:
        """By hand: everything as it is, but for the first of the user's words."""
        drop, text = len(said) - keep, ""
        for content in turns:
            text += "user:"
            for part in content:
                words = part.get("text", "")
                text += "<img>" if part["type"] == "image" else words[drop:]
                drop = max(0, drop - len(words))
            text += f"\nassistant:{answer}\n"
        return text.removesuffix(f"{answer}\n")

    lengths = {keep: len(rendered(keep).replace("<img>", "#")) for keep in range(1, len(said) + 1)}
    most = max((keep for keep, length in lengths.items() if length <= limit), default=0)
    prompt = build(path, limit)
    if not said[len(said) - most :].strip():
        assert prompt is None
    else:
        assert prompt is not None
        assert (prompt.text, prompt.truncated) == (rendered(most), len(said) - most)
        assert prompt.expanded_length == lengths[most]
        assert len(prompt.media) == images


# ---------------------------------------------------------------------- real families


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "internvl", "idefics3", "pixtral"])
def test_real_families_keep_their_media_tokens_and_their_end(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Byte-level tokenizers, and words of several bytes: a cut falls between characters, never into one."""
    adapter = load_adapter(str(build_tiny(family, tmp_path_factory.mktemp(family))))
    question = "<image>" + "Was ist größer, 漢字 oder 🙂? " * 12 + "<image> Say it."
    row = {"prompt": question, "images": [png("red", (64, 60)), png("blue", (90, 56))], "answer": "a"}
    path = write_rows(tmp_path / "a.parquet", [row])
    whole = build(path, 10_000, adapter=adapter, system_prompt="Be brief.")
    assert whole is not None
    protected = (*adapter.banned_token_ids, *adapter.stop_token_ids)
    for limit in (whole.expanded_length - 1, whole.expanded_length - 100, whole.expanded_length - 250):
        prompt = build(path, limit, adapter=adapter, system_prompt="Be brief.")
        assert prompt is not None
        assert prompt.expanded_length <= limit < prompt.expanded_length + 4  # at most one character less than possible
        assert learner_length(adapter, prompt) == prompt.expanded_length
        assert adapter.tokenize(prompt.text) == prompt.token_ids.tolist()
        assert [t for t in prompt.token_ids if t in protected] == [t for t in whole.token_ids if t in protected]
        said, kept = question[7:].replace("<image>", ""), len(question) - 14 - prompt.truncated
        head = whole.text.index("Was ist")
        assert prompt.text[:head] == whole.text[:head]  # the system message, and the first image
        assert prompt.text.endswith(whole.text[whole.text.rindex("Say it.") :])
        assert said[len(said) - kept :][:20].strip() in prompt.text
    assert build(path, len(adapter.tokenize("Be brief.")), adapter=adapter, system_prompt="Be brief.") is None


def learner_length(adapter: MultimodalAdapter, prompt: Prompt) -> int:
    return len(adapter.encode(prompt.text, [decode(m, m.data) for m in prompt.media]).input_ids)


# ---------------------------------------------------------------------- what is said of it


def test_text_models_are_no_different(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"prompt": "0123456789"}])
    prompt = build(path, len("user:56789\nassistant:"), adapter=FakeTextAdapter())
    assert prompt is not None
    assert (prompt.text, prompt.truncated) == ("user:56789\nassistant:", 5)


def test_truncated_rows_are_counted_once_and_reported(tmp_path: Path) -> None:
    rows = [{"prompt": "word " * (40 if n % 5 == 0 else 4)} for n in range(20)]
    data = source(write_rows(tmp_path / "a.parquet", rows), max_prompt_length=100, overlong_prompts="truncate")
    prompts = data.take(60)
    assert {p.ref.row for p in prompts if p.truncated} == {0, 5, 10, 15}
    assert max(p.expanded_length for p in prompts) == 100
    assert data.report().truncated == 4
    assert str(data.report()) == "0 of 20 rows refused; 4 truncated"
    again = data.read([p.ref for p in prompts[:20]])
    assert [p.text for p in again] == [p.text for p in prompts[:20]]


def test_by_default_nothing_is_truncated(tmp_path: Path) -> None:
    data = source(write_rows(tmp_path / "a.parquet", [{"prompt": "word " * 40}]), max_prompt_length=100)
    with pytest.raises(DataError, match=r"1 prompt too long.*\n.*tokens with media expanded, the limit is 100"):
        data.take(1)
    assert data.report().truncated == 0


def test_text_that_is_refused_stays_refused(tmp_path: Path) -> None:
    """A placeholder in the part that would be cut off, too."""
    path = write_rows(tmp_path / "a.parquet", [{"prompt": "<img>" + "word " * 40, "image": RED}])
    data = source(path, max_prompt_length=100, overlong_prompts="truncate", max_refused_share=1.0)
    assert data.attempt(0) is None
    assert data.report().refused == {"placeholder in text": 1}


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_the_largest_that_fits_is_found_without_trying_much_larger_ones(threshold: int, most: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= threshold

    assert largest(fits, most) == min(threshold, most)
    assert len(tried) <= 25
    assert max(tried, default=0) <= max(1, 2 * threshold)
