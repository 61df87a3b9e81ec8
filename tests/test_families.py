"""What holds for every family: inputs are cut apart and joined again, odd images work or are refused, features can
stand in for pixels, every parameter has a role."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from learner.model import load_policy
from learner.samples import collate
from rollout.engine import EngineOptions
from rollout.types import Media
from rollout.vllm_engine import engine_arguments
from tests.learner_cases import make_case, make_group, options, rows_of
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.clips import decode
from vlm.encoded import counts_of
from vlm.media import ImageLimits, MediaError, check_image
from vlm.registry import load_adapter
from vlm.tiny import TINY, build_tiny
from vlm.tiny.noise import noise

MULTIMODAL = sorted(set(TINY) - {"llama", "qwen2", "qwen3"})
SIZES = ((84, 56), (56, 56), (60, 150), (200, 40))


@functools.cache
def model_of(family: str) -> Path:
    return build_tiny(family, Path(tempfile.mkdtemp(prefix="saccade-")) / family)


@functools.cache
def adapter_of(family: str) -> MultimodalAdapter:
    return load_adapter(str(model_of(family)))


def media_of(kinds: Sequence[str], seed: int) -> list[Media]:
    sizes = {i: dict(zip(("width", "height"), SIZES[(seed + i) % len(SIZES)], strict=True)) for i in range(len(kinds))}
    shapes: dict[str, Any] = {"video": {"frames": 2 + 2 * (seed % 3)}, "audio": {"seconds": 0.5 + seed % 3}}
    return [noise(kind, seed + i, **shapes.get(kind, sizes[i])) for i, kind in enumerate(kinds)]


def encode(adapter: MultimodalAdapter, kinds: Sequence[str], seed: int) -> tuple[str, list[Any]]:
    media = media_of(kinds, seed)
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "what is it?"}]
    return adapter.render([{"role": "user", "content": content}]), [decode(m, m.data) for m in media]


def assert_same(ours: EncodedPrompt, other: EncodedPrompt) -> None:
    assert torch.equal(ours.input_ids, other.input_ids) and ours.counts == other.counts
    assert ours.inputs.keys() == other.inputs.keys()
    for name, value in ours.inputs.items():
        assert torch.equal(value, other.inputs[name]), name


@pytest.mark.parametrize("family", MULTIMODAL)
@settings(max_examples=12)
@given(data=st.data())
def test_split_is_the_inverse_of_join(family: str, data: st.DataObject) -> None:
    """Ragged batches: none, one, three, of several shapes and kinds; in one call of the processor or in one each."""
    adapter = adapter_of(family)
    mixes = st.one_of(
        st.sampled_from([[], ["image"], ["image"] * 3]),
        st.lists(st.sampled_from(sorted(adapter.modalities)), max_size=2),
    )
    batch = data.draw(st.lists(mixes, min_size=1, max_size=4))
    if adapter.stacks_videos:  # videos of different lengths in one prompt are refused
        batch = [kinds if kinds.count("video") < 2 else ["video"] for kinds in batch]
    drawn = [encode(adapter, kinds, seed) for seed, kinds in enumerate(batch)]
    alone = [adapter.encode(text, items) for text, items in drawn]
    joined = adapter.join(alone)
    parts = adapter.split(joined, [p.input_ids for p in alone], [counts_of(items) for _, items in drawn])
    for ours, part in zip(alone, parts, strict=True):
        assert_same(ours, part)
    again = adapter.join(parts)
    assert again.keys() == joined.keys() and all(torch.equal(again[name], joined[name]) for name in joined)
    for ours, together in zip(alone, adapter.encode_batch(*map(list, zip(*drawn, strict=True))), strict=True):
        assert_same(ours, together)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (60, 90, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "grayscale": encoded(colour.convert("L"), "PNG"),
        "16-bit grayscale": encoded(Image.fromarray(random.integers(0, 2**16, (60, 90), np.uint16)), "PNG"),
        "bilevel": encoded(colour.convert("1"), "PNG"),
        "RGBA": encoded(colour.convert("RGBA"), "PNG"),
        "palette": encoded(colour.convert("P"), "GIF", transparency=0),
        "CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "turned": encoded(colour, "JPEG", exif=turned),
        "1 pixel": encoded(colour.resize((1, 1)), "PNG"),
        "1 row": encoded(colour.resize((40, 1)), "PNG"),
        "3 rows": encoded(colour.resize((40, 3)), "PNG"),
        "very wide": encoded(colour.resize((1500, 9)), "PNG"),
        "extremely wide": encoded(colour.resize((3000, 2)), "PNG"),
        "very high": encoded(colour.resize((9, 1500)), "PNG"),
    }


@pytest.mark.parametrize("family", MULTIMODAL)
def test_odd_images_work_or_are_refused_before_they_are_used(family: str) -> None:
    """Refused by size, as rows are when they are read; whatever passes has exactly the tokens that were foretold."""
    adapter = adapter_of(family)
    text = adapter.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
    refused = []
    for name, data in odd_images().items():
        try:
            media = Media("image", "", data, *check_image(data, ImageLimits()))
            length = adapter.expanded_length(adapter.tokenize(text), [media])
        except ValueError:
            refused.append(name)
            continue
        prompt = adapter.encode(text, [decode(media, data)])
        assert len(prompt.input_ids) == length, name
        assert all(torch.isfinite(value).all() for value in prompt.inputs.values()), name
    small = {"1 pixel", "1 row", "3 rows", "extremely wide"}
    assert small <= set(refused) <= {*small, "very wide", "very high"}, refused


def test_a_turned_photograph_has_its_sides_exchanged() -> None:
    assert check_image(odd_images()["turned"], ImageLimits()) == (60, 90)


def test_a_cut_image_is_refused() -> None:
    with pytest.raises(MediaError):
        check_image(odd_images()["RGBA"][:-40], ImageLimits())


@pytest.mark.parametrize("family", MULTIMODAL)
def test_features_computed_before_can_stand_in_for_pixels(family: str) -> None:
    adapter = adapter_of(family)
    kinds = tuple(adapter.modalities)
    chosen = options(model_of(family), freeze_vision=True, media_kinds=kinds)
    policy = load_policy(chosen, adapter)
    groups = [
        make_group(adapter, i, media=kinds) for i, kinds in enumerate([["image"], [], ["image"] * 2, list(kinds)])
    ]
    case = make_case(groups)
    batch = collate(rows_of(adapter, chosen, case), adapter)
    consumed = {name for m in adapter.modalities.values() for name in m.inputs}
    with torch.no_grad():
        features = policy.media_features(batch)
        others = {name: value for name, value in batch.extra_model_kwargs.items() if name not in consumed}
        without = replace(batch, pixel_values=None, extra_model_kwargs={**others, "mm_encoder_outputs": features})
        expected, _ = policy(batch)
        logprobs, _ = policy(without.to("cpu"))
    assert features.keys() == adapter.towers().keys()
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0)
    assert expected[batch.loss_mask].abs().min() > 0


@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_part_of_the_model_has_parameters(family: str) -> None:
    adapter = adapter_of(family)
    model = load_policy(options(model_of(family)), adapter).model
    found = {adapter.role(name) for name, _ in model.named_parameters()}
    assert found == {"vision", "projector", "language", *({"audio"} & set(adapter.roles))}
    head = next(name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert adapter.role(head) == "language"


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("part", ["all", "language"])
def test_lora_is_trained_by_every_family(family: str, part: str) -> None:
    """It begins as the base model, has gradients, and is all that has; with a frozen tower it stays out of it."""
    adapter = adapter_of(family)
    chosen = options(model_of(family), lora_rank=2, freeze_vision=part == "language" and adapter.has_vision)
    policy, base = load_policy(chosen, adapter), load_policy(options(model_of(family)), adapter)
    groups = [make_group(adapter, i, images=(2 * i + 1) * adapter.has_vision) for i in range(2)]
    case = make_case(groups)
    batch = collate(rows_of(adapter, chosen, case), adapter)
    logprobs, _ = policy(batch)
    with torch.no_grad():
        torch.testing.assert_close(logprobs, base(batch)[0])
    logprobs.sum().backward()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert all(p.grad is not None for p in trained.values())
    assert any(p.grad.abs().max() > 0 for p in trained.values() if p.grad is not None)
    roles = {adapter.role(name.removeprefix("base_model.model.")) for name in trained}
    assert "language" in roles and (part == "all" or "vision" not in roles)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_videos_of_different_lengths_in_one_prompt_are_refused_by_name(family: str) -> None:
    adapter = adapter_of(family)
    videos = [noise("video", 0, frames=2), noise("video", 1, frames=4)]
    place = adapter.placeholder_ids["video"]
    with pytest.raises(ValueError, match="equally many frames"):
        adapter.expanded_length([place, place], videos)
    texts = [adapter.modalities["video"].placeholder] * 2
    lengths = [len(p.input_ids) for p in adapter.encode_batch(texts, [[decode(v, v.data)] for v in videos])]
    assert lengths == [adapter.expanded_length([place], [v]) for v in videos]


def test_an_engine_loads_every_tower_whose_weights_it_will_be_sent() -> None:
    """vLLM leaves out the tower of a kind of which no item may come."""
    none = EngineOptions("m", device="cpu", max_media_per_prompt={})
    assert engine_arguments(none, adapter_of("qwen2_5_omni"))["limit_mm_per_prompt"] == {
        "image": 1,
        "video": 0,
        "audio": 1,
    }
    some = EngineOptions("m", device="cpu", max_media_per_prompt={"image": 8, "video": 2})
    assert engine_arguments(some, adapter_of("llava"))["limit_mm_per_prompt"] == {"image": 8, "video": 2}
    assert "limit_mm_per_prompt" not in engine_arguments(some, adapter_of("llama"))
