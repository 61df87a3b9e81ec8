"""Data in the forms people have load as they are: small files in exactly these shapes, and what becomes of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rollout.data.source import DataError, PromptSource
from rollout.types import Prompt
from tests.helpers.data_helpers import png, source, write_rows
from vlm.tiny.noise import noise_sound, noise_video

RED, BLUE = png("red"), png("blue", (56, 28))


def prompts(*files: Path, **options: Any) -> list[Prompt]:
    data = source(*files, shuffle=False, **options)
    found = list(data.one_epoch())
    assert data.report().refused == {}
    return found


def images(prompt: Prompt) -> list[bytes]:
    assert {m.kind for m in prompt.media} <= {"image"}
    return [m.data for m in prompt.media]


# ---------------------------------------------------------------------- images


def test_hugging_face_image_structs(tmp_path: Path) -> None:
    """What `datasets` writes for the features Image() and Sequence(Image()): structs, of which one field is null."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "b.png").write_bytes(BLUE)
    texts = {"prompt": ["one", "other"], "answer": ["1", "2"]}
    one = pa.table({**texts, "image": pa.array([{"bytes": RED, "path": "a.png"}, {"path": "b.png"}], struct)})
    many = pa.table({**texts, "images": pa.array([[{"bytes": RED}, {"bytes": BLUE}], []], pa.list_(struct))})
    pq.write_table(one, tmp_path / "one.parquet")
    pq.write_table(many, tmp_path / "many.parquet")
    assert [images(p) for p in prompts(tmp_path / "one.parquet")] == [[RED], [BLUE]]
    assert [images(p) for p in prompts(tmp_path / "many.parquet")] == [[RED, BLUE], []]


def test_easyr1(tmp_path: Path) -> None:
    """Markers in the text of `problem`, a list in `images`."""
    rows = [
        {"images": [{"bytes": RED, "path": None}], "problem": "<image>Find x.", "answer": "3"},
        {"images": [{"bytes": RED}, {"bytes": BLUE}], "problem": "Is <image>\nlike <image>?", "answer": "no"},
    ]
    first, second = prompts(write_rows(tmp_path / "train.parquet", rows))
    assert (first.text, images(first), first.answer) == ("user:<img>Find x.\nassistant:", [RED], "3")
    assert (second.text, images(second)) == ("user:Is<img>like<img>?\nassistant:", [RED, BLUE])


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_verl(tmp_path: Path, name: str) -> None:
    """The gold is a field of the struct `reward_model`; fields can be named with dots wherever columns can."""
    picture = {"bytes": RED} if name.endswith("parquet") else {"bytes": base64.b64encode(RED).decode()}
    row = {
        "data_source": "geo",
        "prompt": [{"role": "user", "content": "<image>Find x."}],
        "images": [picture],
        "reward_model": {"style": "rule", "ground_truth": "40"},
        "extra_info": {"split": "train", "index": 7, "answer": "\\boxed{41}"},
    }
    path = write_rows(tmp_path / name, [row])
    (found,) = prompts(path, options={"extra_columns": ("extra_info.index",)})
    assert (found.text, images(found), found.answer) == ("user:<img>Find x.\nassistant:", [RED], "40")
    assert found.columns == {"extra_info.index": 7}
    data = source(path)
    assert str(data.columns) == "prompt: prompt, image: images, answer: reward_model.ground_truth"
    assert data.unused == ("data_source", "extra_info")
    assert prompts(path, columns={"answer": "extra_info.answer"})[0].answer == "41"
    with pytest.raises(DataError, match=r"no column 'ground_truth' .*; it has reward_model\.ground_truth"):
        source(path, columns={"answer": "ground_truth"})
    whole = source(path, columns={"answer": "reward_model"}, max_refused_share=1.0)
    assert list(whole.look(1)) == [None]
    (refused,) = whole.report().first_refusals
    assert refused.reason == (
        "column 'reward_model': a struct (style, ground_truth); name its field: "
        "data.columns.answer=reward_model.ground_truth"
    )


def test_a_column_whose_name_has_a_dot_goes_before_a_field(tmp_path: Path) -> None:
    row = {"prompt": "q", "a.b": "column", "a": {"b": "field", "c": {"d": "inner"}}}
    path = write_rows(tmp_path / "a.parquet", [row])
    assert prompts(path, columns={"answer": "a.b"})[0].answer == "column"
    assert prompts(path, columns={"answer": "a.c.d"})[0].answer == "inner"


def test_gsm8k(tmp_path: Path) -> None:
    worked = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nThat makes 48+24 = <<48+24=72>>72 clips.\n#### 72"
    rows = [{"question": "How many clips?", "answer": worked}, {"question": "And then?", "answer": "#### 2,125"}]
    assert [p.answer for p in prompts(write_rows(tmp_path / "train.jsonl", rows))] == ["72", "2,125"]


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_images_as_base64_text_and_data_urls(tmp_path: Path, encode: Callable[[bytes], bytes]) -> None:
    """JSON cannot hold bytes. Line breaks, the alphabet of URLs, and a missing padding are no matter."""
    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "noise.jpg")
    for data in (RED, BLUE, (tmp_path / "noise.jpg").read_bytes()):
        text = encode(data).decode()
        forms = (text, text.rstrip("=\n"), f"data:image/png;base64,{text}", f"DATA:;base64,{text}", {"bytes": text})
        rows = [{"prompt": "q", "image": form} for form in forms] + [{"prompt": "q", "image": [text]}]
        assert [images(p) for p in prompts(write_rows(tmp_path / "a.jsonl", rows))] == [[data]] * 6


def test_a_path_that_base64_could_be_is_still_a_path(tmp_path: Path) -> None:
    name = "a" * 60 + "/" + "b" * 60
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(RED)
    assert images(prompts(write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "image": name}]))[0]) == [RED]


def test_open_r1_and_trl(tmp_path: Path) -> None:
    """`prompt` as messages, with and without a part for the image; `solution` in answer tags."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    with_part = {
        "image": {"bytes": RED},
        "prompt": [{"role": "user", "content": parts}],
        "solution": "<answer> 3 </answer>",
    }
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many?"}]
    without = {"image": {"bytes": BLUE}, "prompt": turns, "solution": "<answer>4</answer>"}
    (one,) = prompts(write_rows(tmp_path / "one.parquet", [with_part]))
    assert (one.text, images(one), one.answer) == ("user:<img>How many?\nassistant:", [RED], "3")
    reasoned = without | {"solution": "<think>One, two.</think>\n\n<answer>B</answer>"}
    assert prompts(write_rows(tmp_path / "three.parquet", [reasoned]))[0].answer == "B"
    (two,) = prompts(write_rows(tmp_path / "two.parquet", [without]))
    assert (two.text, images(two), two.answer) == ("system:Think.\nuser:<img>How many?\nassistant:", [BLUE], "4")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.parquet"])
def test_vlm_r1_grounding(tmp_path: Path, name: str) -> None:
    """A caption for the template, and a box as the answer."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.png").write_bytes(RED)
    rows = [
        {
            "image": "coco/1.png",
            "normal_caption": "the <b>left</b> cup",
            "solution": [12, 3, 40, 55],
            "dataset": "refcoco",
        }
    ]
    template = 'Please give the box of "{prompt}" as {"box": [x1, y1, x2, y2]}.'
    (prompt,) = prompts(write_rows(tmp_path / name, rows), prompt_template=template)
    expected = 'user:<img>Please give the box of "the <b>left</b> cup" as {"box": [x1, y1, x2, y2]}.\nassistant:'
    assert (prompt.text, images(prompt), prompt.answer) == (expected, [RED], "[12, 3, 40, 55]")


LLAVA = [
    {
        "id": "000000033471",
        "image": "coco/train2017/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back?"},
            {"from": "gpt", "value": "An advertisement."},
        ],
    },
    {
        "id": "text only",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Say yes."},
            {"from": "gpt", "value": "<answer>yes</answer>"},
        ],
    },
]


def test_llava_conversations(tmp_path: Path) -> None:
    """One JSON array; the last turn is the answer and not part of the prompt."""
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "coco/train2017/1.png").write_bytes(RED)
    bus, text = prompts(write_rows(tmp_path / "llava_v1_5_mix665k.json", LLAVA))
    assert bus.text == (
        "user:<img>What are the colors of the bus in the image?\n"
        "assistant:The bus in the image is white and red.\n"
        "user:What feature can be seen on the back?\n"
        "assistant:"
    )
    assert (images(bus), bus.answer, bus.ref.uid) == ([RED], "An advertisement.", "llava_v1_5_mix665k.json:0")
    assert (text.text, text.media, text.answer) == ("system:Be brief.\nuser:Say yes.\nassistant:", (), "yes")


def test_a_conversation_must_end_with_the_answer_where_it_holds_it_and_only_there(tmp_path: Path) -> None:
    asked = {"conversations": LLAVA[1]["conversations"][:2]}  # type: ignore[index]
    data = source(write_rows(tmp_path / "a.json", [LLAVA[1], asked]), max_refused_share=1.0)
    assert len(list(data.one_epoch())) == 1
    assert data.report().refused == {"no answer": 1}
    assert "the last message must be the assistant's, since it is the answer" in data.report().first_refusals[0].reason
    bare = source(tmp_path / "a.json", max_refused_share=1.0, columns={"answer": None})
    assert [(p.ref.row, p.answer) for p in bare.one_epoch()] == [(1, None)]
    assert "set data.columns.answer to the prompt's column" in bare.report().first_refusals[0].reason


# ---------------------------------------------------------------------- videos and sounds


@pytest.mark.parametrize("as_bytes", [True, False])
def test_videos_are_paths_or_bytes_of_which_frames_are_sampled(tmp_path: Path, as_bytes: bool) -> None:
    data = noise_video(0, frames=21).data
    (tmp_path / "clip.mp4").write_bytes(data)
    row = {"video": data if as_bytes else "clip.mp4", "prompt": "What happens?", "answer": "noise"}
    (prompt,) = prompts(write_rows(tmp_path / "a.parquet", [row]), max_video_frames=5)
    (media,) = prompt.media
    assert (media.kind, media.data, media.width, media.height) == ("video", data, 84, 56)
    assert (media.frames, media.total_frames, media.fps) == ((0, 5, 10, 15, 20), 21, 2.0)
    assert prompt.text == "user:<vid>What happens?\nassistant:"
    assert prompt.expanded_length == len(prompt.token_ids) - 1 + 5 * 3 * 2
    (eight,) = prompts(tmp_path / "a.parquet")
    assert len(eight.media[0].frames) == 8
    assert eight.media[0].digest != media.digest


def test_kinds_of_media_mix_in_the_order_of_their_places(tmp_path: Path) -> None:
    sound, video = noise_sound(0, seconds=1.5).data, noise_video(0).data
    text = "First <audio>, then <image>, then <video>, then <image>."
    row = {"prompt": text, "images": [RED, BLUE], "video": video, "audio": sound}
    (prompt,) = prompts(write_rows(tmp_path / "a.parquet", [row]))
    assert prompt.text == "user:First<snd>, then<img>, then<vid>, then<img>.\nassistant:"
    assert [(m.kind, m.data) for m in prompt.media] == [
        ("audio", sound),
        ("image", RED),
        ("video", video),
        ("image", BLUE),
    ]
    assert prompt.media[0].samples == 24_000
    (unmarked,) = prompts(write_rows(tmp_path / "b.parquet", [{**row, "prompt": "What is all this?"}]))
    assert unmarked.text == "user:<img><img><vid><snd>What is all this?\nassistant:"
    assert [m.kind for m in unmarked.media] == ["image", "image", "video", "audio"]


# ---------------------------------------------------------------------- templates and markers


def test_a_template_goes_around_the_texts_of_the_last_user_message(tmp_path: Path) -> None:
    image, system = {"type": "image"}, {"role": "system", "content": "s"}
    parts = [image, {"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
    cases: list[tuple[Any, list[bytes], str]] = [
        ("q", [RED], "user:<img>Q: q!\nassistant:"),
        ("<image> q <image>", [RED, BLUE], "user:Q:<img>q<img>!\nassistant:"),
        ([{"role": "user", "content": [image]}], [RED], "user:<img>Q: !\nassistant:"),
        ([{"role": "user", "content": parts}], [RED, BLUE], "user:<img>Q: a<img>b!\nassistant:"),
        (
            [
                system,
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            [],
            "system:s\nuser:a\nassistant:b\nuser:Q: c!\nassistant:",
        ),
    ]
    for n, (value, found, expected) in enumerate(cases):
        row = {"prompt": value, "image": [f"{i}.png" for i in range(len(found))]}
        for i, data in enumerate(found):
            (tmp_path / f"{i}.png").write_bytes(data)
        (prompt,) = prompts(write_rows(tmp_path / f"{n}.jsonl", [row]), prompt_template="Q: {prompt}!")
        assert (prompt.text, images(prompt)) == (expected, found)


def test_a_template_can_say_where_the_image_goes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"prompt": "q", "image": RED}])
    (prompt,) = prompts(path, prompt_template="{prompt} <image> Answer:")
    assert prompt.text == "user:q<img>Answer:\nassistant:"


def test_markers_are_places_whatever_the_familys_own_token_is(tiny_model: Path, tmp_path: Path) -> None:
    from vlm.families.registry import load_adapter

    data = write_rows(tmp_path / "a.json", [{"problem": "<image>\n<image>Which <b>?", "images": ["a.png", "b.png"]}])
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "b.png").write_bytes(BLUE)
    real = PromptSource(source(data).options, load_adapter(str(tiny_model)))
    (prompt,) = real.take(1)
    media = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"{media}\n{media}Which <b>?" in prompt.text
    assert images(prompt) == [RED, BLUE]


def test_json_and_jsonl_and_parquet_make_the_same_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    rows = [{"problem": f"<image> {n}", "image": "a.png", "solution": n} for n in range(5)]
    found = [prompts(write_rows(tmp_path / f"a.{suffix}", rows)) for suffix in ("json", "jsonl", "parquet")]
    texts = [[(p.text, p.answer, images(p)) for p in each] for each in found]
    assert texts[0] == texts[1] == texts[2]
    assert json.loads((tmp_path / "a.json").read_text()) == rows
