"""The tiny models load like any other, count image tokens as the processor does, and really see their pixels."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

from saccade.demo import shapes
from tests.helpers.data_helpers import source, write_rows
from vlm.adapter import MultimodalAdapter
from vlm.families.registry import ADAPTERS, load_adapter
from vlm.media.types import Media
from vlm.tiny import ANSWER_TAGS, TINY, TinySizes, build_tiny

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color are the shapes ?"}]}]


@pytest.fixture(scope="module", params=sorted(TINY))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(request.param, tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def adapter(directory: Path) -> MultimodalAdapter:
    return load_adapter(str(directory))


@pytest.fixture(scope="module")
def words_adapter(tmp_path_factory: pytest.TempPathFactory) -> MultimodalAdapter:
    path = build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("words"), words=shapes.vocabulary())
    return load_adapter(str(path))


def test_every_family_has_a_tiny_model() -> None:
    assert {name.rpartition("/")[2] for name in ADAPTERS} == set(TINY)


def test_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'nosuch'.*qwen2_5_vl"):
        build_tiny("nosuch", tmp_path)
    assert not list(tmp_path.iterdir())


def load_model(directory: Path, adapter: MultimodalAdapter) -> Any:
    return adapter.model_class().from_pretrained(directory)


def test_no_weight_of_it_is_lost_or_made_up_when_it_is_loaded(directory: Path, adapter: MultimodalAdapter) -> None:
    model, report = adapter.model_class().from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 3e6


def test_the_demos_model_is_reproducible_and_wide(tmp_path: Path) -> None:
    directory = build_tiny("qwen2_5_vl", tmp_path / "first", seed=1)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # a part that ignored initializer_range would not learn
            assert parameter.detach().std().item() == pytest.approx(TinySizes().initializer_range, rel=0.05), name
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = build_tiny(model.config.model_type, tmp_path / "again", seed=1)
    assert torch.equal(torch.rand(3), expected), "building a model must leave the caller's random state alone"
    other = build_tiny(model.config.model_type, tmp_path / "other", seed=2)
    weights = (directory / "model.safetensors").read_bytes()
    assert weights == (again / "model.safetensors").read_bytes()
    assert weights != (other / "model.safetensors").read_bytes()


def test_end_of_turn_ends_a_completion_everywhere(directory: Path, adapter: MultimodalAdapter) -> None:
    end = adapter.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = load_model(directory, adapter)
    assert adapter.stop_token_ids == (end,)
    assert model.generation_config.eos_token_id == end
    assert model.generation_config.pad_token_id == adapter.tokenizer.pad_token_id
    assert model.config.get_text_config().eos_token_id == end
    assert adapter.tokenizer.pad_token_id not in adapter.stop_token_ids


def test_the_smallest_image_takes_four_tokens(words_adapter: MultimodalAdapter) -> None:
    encoded = words_adapter.encode(words_adapter.render(QUESTION), [Image.new("RGB", (56, 56))])
    assert encoded.input_ids.tolist().count(words_adapter.placeholder_ids["image"]) == 4


@settings(max_examples=25)
@given(sizes=st.lists(st.tuples(st.integers(60, 500), st.integers(60, 500)), max_size=3))
def test_length_is_known_from_image_sizes_alone(adapter: MultimodalAdapter, sizes: list[tuple[int, int]]) -> None:
    sizes = sizes if adapter.has_vision else []
    content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "what do you see?"}]
    text = adapter.render([{"role": "user", "content": content}])
    encoded = adapter.encode(text, [Image.new("RGB", (width, height)) for height, width in sizes])
    media = [Media("image", "", b"", width, height) for height, width in sizes]
    assert adapter.expanded_length(adapter.tokenize(text), media) == len(encoded.input_ids)


@torch.no_grad()
def test_changed_pixels_move_the_next_token(directory: Path, adapter: MultimodalAdapter) -> None:
    if not adapter.has_vision:
        pytest.skip("a text model")
    model = load_model(directory, adapter)
    text = adapter.render(QUESTION)

    def logprobs(color: tuple[int, int, int]) -> torch.Tensor:
        encoded = adapter.encode(text, [Image.new("RGB", (56, 56), color)])
        ids = encoded.input_ids[None]
        return model(input_ids=ids, **encoded.inputs, **adapter.token_inputs(ids)).logits[0, -1].log_softmax(-1)

    red, blue = logprobs((220, 30, 30)), logprobs((40, 60, 220))
    assert torch.equal(red, logprobs((220, 30, 30)))
    assert (red - blue).abs().max() > 0.1


@given(text=st.text(max_size=40))
def test_bytes_spell_any_text(adapter: MultimodalAdapter, text: str) -> None:
    """But for what Unicode counts as the same: some families' tokenizers normalise that."""
    text = unicodedata.normalize("NFC", text)
    assert adapter.tokenizer.decode(adapter.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_words_spell_every_text_of_the_demo(words_adapter: MultimodalAdapter) -> None:
    tokenizer = words_adapter.tokenizer
    for kind, answers in shapes.ANSWERS.items():
        completions = [shapes.completion(answer) for answer in answers]
        for text in [*shapes.QUESTIONS[kind], *completions]:
            ids = words_adapter.tokenize(text)
            assert tokenizer.unk_token_id not in ids and "<unk>" not in tokenizer.decode(ids)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert len(ids) == len(text.split())
    rendered = words_adapter.render([{"role": "system", "content": "look"}, *QUESTION])
    assert "<unk>" not in tokenizer.decode(words_adapter.tokenize(rendered))


def test_answer_tags_are_ordinary_tokens(adapter: MultimodalAdapter, words_adapter: MultimodalAdapter) -> None:
    for tokenizer in (adapter.tokenizer, words_adapter.tokenizer):
        ids = tokenizer("".join(ANSWER_TAGS), add_special_tokens=False)["input_ids"]
        assert len(ids) == 4
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_no_text_becomes_a_control_token_and_tags_are_none(adapter: MultimodalAdapter, tmp_path: Path) -> None:
    control = {*adapter.control_tokens.values()}
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", *adapter.placeholder_tokens} <= control
    assert not control & {*ANSWER_TAGS, "\n"}
    forged = sorted(control - {"<image>", "<video>", "<audio>"})  # those three are our own marks for media
    texts = [*forged, "a < b", "<think> \n </think>", "<|im_start |>"]
    data = source(write_rows(tmp_path / "a.jsonl", [{"prompt": f"a{text}b"} for text in texts]), adapter=adapter)
    assert [data.attempt(row) is None for row in range(len(texts))] == [True] * len(forged) + [False] * 3
    assert set(data.report().refused) <= {"control token in text", "placeholder in text"}
    media = [{"type": "image"}] if adapter.modalities else []
    turn = [{"role": "user", "content": [*media, {"type": "text", "text": "hi"}]}]
    written = [i for i in adapter.tokenize(adapter.render(turn)) if i in adapter.control_tokens]
    assert len(written) >= 3 + len(media)


def test_widths_divide_for_tensor_parallelism() -> None:
    sizes = TinySizes()
    for heads in (sizes.heads, sizes.kv_heads, sizes.vision_heads):
        assert heads % 2 == 0
