"""`saccade data inspect` and `data check`: what a run would make of files, said before it starts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rollout.data.source import DataError
from saccade.commands.check_data import check_data
from saccade.commands.inspect_data import BARS, bars, inspect_data
from saccade.config.load import data_config, parse_config
from saccade.config.messages import ConfigError
from saccade.preflight import resolve
from tests.helpers.data_helpers import png, write_rows
from vlm.tiny.noise import noise_sound, noise_video


def inspected(*arguments: str | Path, model: Path | None = None, rows: int = 1000) -> str:
    out = io.StringIO()
    name = str(model) if model else None
    inspect_data(data_config([str(a) for a in arguments], name), name, rows, Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows, two of them bad; images of two sizes."""
    folder = tmp_path_factory.mktemp("llava")
    for n, size in enumerate([(64, 48), (128, 96)]):
        (folder / f"{n}.png").write_bytes(png("red", size))
    (folder / "bad.png").write_bytes(b"GIF?")
    rows: list[dict[str, Any]] = []
    for n in range(40):
        image = {7: "gone.png", 8: "bad.png"}.get(n, f"{n % 2}.png")
        turns = [
            {"from": "human", "value": f"<image>\nWhat is {'this ' * (n + 1)}?"},
            {"from": "gpt", "value": f"It is {n}."},
        ]
        rows.append({"id": n, "image": image, "conversations": turns})
    return write_rows(folder / "train.json", rows)


def test_without_a_model_characters_are_counted(llava: Path) -> None:
    text = inspected(llava)
    assert "columns  prompt: conversations, image: image, answer: last turn of conversations  (not used: id)" in text
    assert "rows     40, 40 read: 38 usable, 2 refused; 38 image(s)" in text
    figures = {
        line[:21].strip(): line[21:].split()[:4] for line in text.splitlines() if line.startswith(("image", "prompt"))
    }
    assert figures["image width"] == ["64", "128", "128", "128"]
    assert figures["image height"] == ["48", "96", "96", "96"]
    fixed = len("user: <image>\nWhat is ?\n") - len("<image>") + 1 - 1  # the marker counts as one, and is the image
    assert figures["prompt, in characters"][0] == str(fixed + 5)
    assert figures["prompt, in characters"][3] == str(fixed + 5 * 40)
    assert "Pass --model PATH to count tokens" in text
    assert "refused  1 missing image, 1 bad image" in text or "refused  1 bad image, 1 missing image" in text
    assert f"{llava} row 7: image 0: no file {llava.parent / 'gone.png'}" in text
    assert f"{llava} row 8: image 0: not a readable image" in text
    assert text.count("\ntrain.json:") == 3
    assert text.count("  | user: <image>\n  | What is this ") == 3
    assert text.count("  answer: It is ") == 3


def test_with_a_model_tokens_are_counted_and_long_prompts_found(llava: Path, tiny_model: Path) -> None:
    text = inspected(llava, "data.max_prompt_length=200", model=tiny_model)
    (line,) = [line for line in text.splitlines() if line.startswith("prompt, in tokens")]
    low, median, _, longest = map(int, line.removeprefix("prompt, in tokens").split()[:4])
    assert low < median < 200 < longest, "also those that are refused are in the figures"
    refused = int(text.partition(" prompt too long")[0].split()[-1])
    assert 0 < refused < 38
    assert f"read: {38 - refused} usable, {2 + refused} refused; 38 image(s)" in text
    assert "tokens with media expanded, the limit is 200" in text
    assert "  | <|vision_start|><|image_pad|><|vision_end|>\n  | What is" in text
    cut = inspected(llava, "data.max_prompt_length=200", "data.overlong_prompts=truncate", model=tiny_model)
    assert f"truncated to data.max_prompt_length=200: {refused}" in cut
    assert "prompt too long" not in cut
    assert "read: 38 usable" in cut


def test_knobs_are_taken_beside_files_and_rows_are_drawn(llava: Path) -> None:
    text = inspected(llava, "data.columns.answer=id", "data.prompt_template=Say {prompt}", rows=5)
    assert "answer: id" in text
    assert "rows     40, 5 read: " in text
    shown = [line for line in text.splitlines() if line.startswith("train.json:")]
    assert shown != [f"train.json:{n}" for n in range(3)], "drawn, not the first"
    with pytest.raises(ConfigError, match=r"data\.columns\.promt: unknown role"):
        inspected(llava, "data.columns.promt=x")
    with pytest.raises(DataError, match="no such file"):
        inspected("no.json")


def test_videos_and_sounds_are_described(tmp_path: Path) -> None:
    row = {"prompt": "q", "video": noise_video(0, frames=12).data, "audio": noise_sound(0, seconds=1.5).data}
    text = inspected(write_rows(tmp_path / "a.parquet", [row]))
    found = {line.split("  ")[0]: line.split()[-5] for line in text.splitlines() if line.startswith(("video", "audio"))}
    assert found == {
        "video width": "84",
        "video height": "56",
        "video seconds": "6",
        "video frames shown": "8",
        "audio seconds": "1.5",
    }
    assert "1 usable, 0 refused; 1 video(s); 1 audio(s)" in text
    assert "  no answer" in text


def test_bars_have_the_heights_of_their_bins() -> None:
    assert bars([5, 5, 5]) == "█"
    line = bars([0] * 8 + [24] * 4 + [13])
    assert (len(line), line[0], line[-1], line[13]) == (24, "█", "▄", "▁")
    assert set(line) <= set(BARS)


def test_a_run_and_a_check_say_which_columns_were_chosen(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"problem": "<image> q", "images": [png()], "solution": n} for n in range(4)]
    train = write_rows(tmp_path / "train.parquet", rows)
    config = parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "steps": 1,
            "model": {"path": str(tiny_model)},
            "data": {"train": [str(train)], "max_prompt_length": 256},
            "rollout": {"max_completion_length": 12},
            "learner": {"prompts_per_step": 4},
        }
    )
    chosen = "data.train: 4 rows; prompt: problem, image: images, answer: solution"
    assert chosen in resolve(config).lines
    out = io.StringIO()
    assert check_data(config, None, Console(file=out, width=200))
    assert chosen in out.getvalue()
    assert "0 of 4 rows refused" in out.getvalue()


def test_a_long_answer_and_a_refused_row_are_shown_in_short_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "image": None, "answer": "a" * 5000}, {"prompt": "q", "image": "x" * 10**6, "answer": "a"}]
    text = inspected(write_rows(tmp_path / "a.jsonl", rows))
    assert "... (5,000 characters)" in text
    assert "is neither a path nor base64 text of a known format (1,000,000 characters)" in text
    assert max(map(len, text.splitlines())) < 700
