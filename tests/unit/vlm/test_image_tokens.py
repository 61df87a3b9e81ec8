"""`model.max_image_tokens` reaches the learner's processor and vLLM's alike, or is refused by name; so do the tokens
that end a completion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rollout.data.source import PromptSource
from rollout.engines.vllm_config import engine_arguments
from saccade.config.load import parse_config
from saccade.config.options import config_adapter, data_options, engine_options, learner_options
from tests.helpers.data_helpers import png, write_rows
from vlm.adapter import MultimodalAdapter
from vlm.errors import AdapterError
from vlm.families.registry import load_adapter
from vlm.media.video_audio import decode
from vlm.tiny import build_tiny
from vlm.tiny.noise import noise

SHAPES = ((300, 220), (220, 400), (56, 56), (500, 500))
LIMITS = {
    "idefics3": (40, 34),
    "internvl": (20, 14),
    "mistral3": (7, 6),
    "qwen2_5_omni": (7, 6),
    "qwen2_5_vl": (20, 18),
    "qwen2_vl": (20, 18),
    "qwen3_vl": (20, 18),
    "smolvlm": (40, 34),
}
"""Family -> the limit, and the most that an image of SHAPES then takes, by hand: two tiles of 4 tokens, a thumbnail and
2 tokens around them; rows of 2 and their ends; 2 x 3 or 3 x 6 squares; 2 x 2 tiles of 6, one of 7, ends of lines."""


Limited = tuple[str, Path, MultimodalAdapter]


@pytest.fixture(scope="module", params=LIMITS)
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Limited:
    path = build_tiny(request.param, tmp_path_factory.mktemp(request.param))
    if request.param in ("idefics3", "smolvlm"):  # three tiles in a row: the limit leaves two
        for file in path.glob("*processor_config.json"):
            text = file.read_text()
            file.write_text(text.replace('"longest_edge": 112', '"longest_edge": 168'))
    return request.param, path, load_adapter(str(path), max_image_tokens=LIMITS[request.param][0])


def prompt_of(adapter: MultimodalAdapter, shape: tuple[int, int]) -> tuple[str, list[int], list[Any]]:
    media = [noise("image", 0, width=shape[0], height=shape[1]), noise("image", 1, width=60, height=90)]
    parts: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    if "video" in adapter.modalities:
        media.append(noise("video", 2, frames=6, width=112, height=84))
        parts.append({"type": "video"})
    text = adapter.render([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}])
    return text, adapter.tokenize(text), media


def test_no_image_takes_more_and_lengths_are_foretold(limited: Limited) -> None:
    family, path, adapter = limited
    limit, most = LIMITS[family]
    free = load_adapter(str(path))
    found = []
    for shape in SHAPES:
        text, ids, media = prompt_of(adapter, shape)
        found.append(adapter.media_lengths(media)[0])
        assert len(adapter.encode(text, [decode(m, m.data) for m in media]).input_ids) == adapter.expanded_length(
            ids, media
        )
        assert adapter.media_lengths(media)[2:] == free.media_lengths(media)[2:]  # videos are as they were
    assert max(found) == most <= limit < max(free.media_lengths([noise("image", 0, width=500, height=500)]))


@pytest.mark.parametrize(
    ("family", "limit", "expected"),
    [
        ("gemma3", 2, "every image takes the same number of tokens"),
        ("llava", 5, "every image takes the same number"),
        ("aria", 5, "every image takes the same number"),
        ("llava_next", 20, "image_grid_pinpoints"),
        ("llava_onevision", 20, "image_grid_pinpoints"),
        ("pixtral", 20, "vLLM counts the tokens of an image by"),
        ("qwen2", 20, "the model takes no images"),
        ("internvl", 5, "an image takes at least 6 tokens"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(family: str, limit: int, expected: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"model.max_image_tokens={limit} cannot be kept: .*{expected}"):
        load_adapter(str(build_tiny(family, tmp_path)), max_image_tokens=limit)


def test_one_knob_reaches_data_engine_learner_and_the_saved_model(tiny_model: Path, tmp_path: Path) -> None:
    row = {"prompt": "<image> What?", "images": [png(size=(400, 400))], "answer": "x"}
    rows = write_rows(tmp_path / "rows.parquet", [row])
    tree: dict[str, Any] = {
        "output_dir": "x",
        "steps": 1,
        "model": {"path": str(tiny_model), "max_image_tokens": 10},
        "data": {"train": [str(rows)]},
    }
    config = parse_config(tree)
    adapter = config_adapter(config)
    (prompt,) = PromptSource(data_options(config, config.data.train), adapter).look(1)
    assert prompt is not None
    assert prompt.expanded_length == len(prompt.token_ids) - 1 + 9  # 3 x 3 squares of 28 pixels
    free = load_adapter(str(tiny_model))
    assert free.expanded_length(prompt.token_ids, prompt.media) > prompt.expanded_length
    assert learner_options(config, "cpu", ("image",)).model.max_image_tokens == 10
    told = engine_arguments(engine_options(config, "cpu", ("image",)), adapter)
    size = {"shortest_edge": 3136, "longest_edge": 10 * 28 * 28}
    assert told["mm_processor_kwargs"] == {"images_kwargs": {"size": size}}
    assert engine_arguments(engine_options(config, "cpu", ("image",)), free)["mm_processor_kwargs"] is None
    adapter.processor.save_pretrained(tmp_path / "saved")
    saved = type(adapter.processor).from_pretrained(tmp_path / "saved").image_processor
    assert saved.size["longest_edge"] == 10 * 28 * 28
    shutil.copytree(tiny_model, tmp_path / "trained")
    shutil.copytree(tmp_path / "saved", tmp_path / "trained", dirs_exist_ok=True)
    again = load_adapter(str(tmp_path / "trained"), max_image_tokens=10)  # the same configuration evaluates it
    assert again.expanded_length(prompt.token_ids, prompt.media) == prompt.expanded_length
    assert again.engine_processor == {}


@pytest.mark.parametrize("family", ["gemma3", "internvl", "pixtral"])
def test_a_limit_that_no_image_reaches_is_kept_as_it_is(family: str, tmp_path: Path) -> None:
    assert load_adapter(str(build_tiny(family, tmp_path)), max_image_tokens=72).engine_processor == {}
