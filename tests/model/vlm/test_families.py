"""What holds for every family: inputs are cut apart and joined again, odd images work or are refused, features can
stand in for pixels, every parameter has a role."""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from learner.batching.collate import collate, collate_packed, collate_padded
from learner.batching.rows import Sample, TrainingRow, encode_prompts, shares_prompts, to_sample
from learner.model.load import load_policy
from rollout.engines.protocol import EngineOptions
from rollout.engines.vllm_config import engine_arguments
from tests.helpers.learner_cases import make_case, make_group, options, rows_of
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.config import ModelConfig
from vlm.encoding import counts_of
from vlm.errors import AdapterError
from vlm.families.idefics3 import patch_places
from vlm.families.mrope import mrope_positions
from vlm.families.registry import load_adapter
from vlm.media.images import ImageLimits, MediaError, check_image
from vlm.media.types import Media
from vlm.media.video_audio import decode
from vlm.media_cost import patches, patches_per_token
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
            media = Media("image", "", data, *check_image(data, ImageLimits(2**20, 10**6)))
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
    assert check_image(odd_images()["turned"], ImageLimits(2**20, 10**6)) == (60, 90)


def test_a_cut_image_is_refused() -> None:
    with pytest.raises(MediaError):
        check_image(odd_images()["RGBA"][:-40], ImageLimits(2**20, 10**6))


@pytest.mark.parametrize("family", MULTIMODAL)
def test_cached_features_can_take_the_place_of_pixels(family: str) -> None:
    adapter = adapter_of(family)
    kinds = tuple(adapter.modalities)
    chosen = options(model_of(family), freeze=("vision",), media_kinds=kinds)
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
        cached = {kind: tuple(adapter.cut_features(own)) for kind, own in features.items()}
        without = replace(batch, pixel_values=None, cached_features=cached, extra_model_kwargs=others)
        expected, _ = policy(batch)
        logprobs, _ = policy(without.to("cpu"))
    assert features.keys() == adapter.towers().keys()
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0)
    assert expected[batch.loss_mask].abs().min() > 0


PATCHES = {"qwen2_5_vl": 4.0, "qwen3_vl": 4.0, "llava": 1.0, "internvl": 4.0, "qwen2_5_omni": 4.0}
"""Of 56 x 56 pixels by hand: merged two by two; all patches of the tile; merged two by two."""


@pytest.mark.parametrize("family", MULTIMODAL)
def test_patches_are_those_that_the_tower_computes(family: str) -> None:
    """Counted where the tower embeds them."""
    adapter = adapter_of(family)
    policy = load_policy(options(model_of(family)), adapter)
    prompt = adapter.dummy_prompt("image")
    seen: list[int] = []
    tower = next(m for m in policy.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    tower.register_forward_hook(lambda module, given, out: seen.append(out.numel() // module.out_channels))
    policy.media_features(collate([TrainingRow(prompt, ())], adapter))
    assert seen == [patches(adapter, prompt)]
    assert patches_per_token(adapter, "image") == pytest.approx(
        PATCHES.get(family, patches_per_token(adapter, "image"))
    )


@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_part_of_the_model_has_parameters(family: str) -> None:
    adapter = adapter_of(family)
    model = load_policy(options(model_of(family)), adapter).model
    found = {adapter.role(name) for name, _ in model.named_parameters()}
    assert found == {"vision", "projector", "language", *({"audio"} & set(adapter.roles))}
    head = next(name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert adapter.role(head) == "language"


def test_videos_of_different_lengths_in_one_prompt_are_refused_by_name() -> None:
    adapter = adapter_of("internvl")
    videos = [noise("video", 0, frames=2), noise("video", 1, frames=4)]
    place = adapter.placeholder_ids["video"]
    with pytest.raises(ValueError, match="equally many frames"):
        adapter.expanded_length([place, place], videos)
    texts = [adapter.modalities["video"].placeholder] * 2
    lengths = [len(p.input_ids) for p in adapter.encode_batch(texts, [[decode(v, v.data)] for v in videos])]
    assert lengths == [adapter.expanded_length([place], [v]) for v in videos]


def test_an_engine_loads_every_tower_whose_weights_it_will_be_sent() -> None:
    """vLLM leaves out the tower of a kind of which no item may come."""
    none = EngineOptions(ModelConfig("m"), device="cpu", max_media_per_prompt={})
    assert engine_arguments(none, adapter_of("qwen2_5_omni"))["limit_mm_per_prompt"] == {
        "image": 1,
        "video": 0,
        "audio": 1,
    }
    some = EngineOptions(ModelConfig("m"), device="cpu", max_media_per_prompt={"image": 8, "video": 2})
    assert engine_arguments(some, adapter_of("llava"))["limit_mm_per_prompt"] == {"image": 8, "video": 2}
    assert "limit_mm_per_prompt" not in engine_arguments(some, adapter_of("llama"))


@pytest.mark.parametrize("family", MULTIMODAL)
def test_rows_of_one_prompt_share_its_media_and_see_what_each_would_alone(family: str) -> None:
    """Completions in rows of their own and behind one prompt, among other prompts, against each in a batch alone."""
    adapter = adapter_of(family)
    chosen = options(model_of(family), media_kinds=tuple(adapter.modalities))
    policy = load_policy(chosen, adapter)
    mixes = [["image"], [], ["image", *(k for k in adapter.modalities if k != "image")], ["image"] * 2]
    groups = [make_group(adapter, i, media=kinds, scores=[0.0, 1.0, 0.5]) for i, kinds in enumerate(mixes)]
    media = {m.digest: m.data for g in groups for m in g.prompt.media}
    prompts = encode_prompts(adapter, groups, media)
    samples = [[to_sample(c) for c in g.completions] for g in groups]
    own = [TrainingRow(prompt, (sample,)) for prompt, mine in zip(prompts, samples, strict=True) for sample in mine]
    mixed = [own[i] for i in (9, 0, 3, 6, 1, 10, 7, 4, 2, 8, 5, 11)]

    def logprobs(rows: Sequence[TrainingRow], packed: bool = False) -> dict[int, torch.Tensor]:
        batch = (collate_packed if packed else collate_padded)(rows, adapter)
        inside = [s for row in rows for s in row.samples]
        parts = policy(batch)[0][batch.loss_mask].split([len(s) for s in inside])
        return {id(s): part for s, part in zip(inside, parts, strict=True)}

    with torch.no_grad():
        alone = {key: value for row in own for key, value in logprobs([row]).items()}
        layouts = [logprobs(mixed)]
        if adapter.shares_prompts:
            layouts.append(
                logprobs([TrainingRow(p, tuple(mine)) for p, mine in zip(prompts, samples, strict=True)], True)
            )
            layouts.append(logprobs(mixed, True))
    for layout in layouts:
        for key, value in alone.items():
            torch.testing.assert_close(layout[key], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=["float32", "float64"]
)
@pytest.mark.parametrize("family", [family for family in sorted(TINY) if family != "gemma3"])
def test_packed_groups_give_the_loss_and_gradients_of_padded_rows(family: str, dtype: torch.dtype) -> None:
    """Several turns and lengths from 1 to 60 tokens, among text, one image and two; of every parameter, towers too."""
    if (family, dtype) == ("aria", torch.float64):
        pytest.skip("transformers' experts are multiplied by a kernel that has no float64")
    adapter = adapter_of(family)
    chosen = options(model_of(family), media_kinds=tuple(adapter.modalities))
    policy = load_policy(chosen, adapter).to(dtype)
    policy._dtype = dtype
    mixes = [["image"] * (n * adapter.has_vision) for n in (1, 0, 2)]
    groups = [make_group(adapter, i, media=kinds, scores=[0.0] * 4) for i, kinds in enumerate(mixes)]
    prompts = encode_prompts(adapter, groups, {m.digest: m.data for g in groups for m in g.prompt.media})
    random = np.random.default_rng(0)
    samples = [[several_turns(random, n) for n in (1, 3, 60, 9)] for _ in groups]

    def gradients(rows: list[TrainingRow], packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
        batch = (collate_packed if packed else collate_padded)(rows, adapter).to("cpu", dtype)
        policy.zero_grad()
        logprobs, entropy = policy(batch)
        assert batch.advantages is not None
        loss = -(logprobs * batch.advantages).sum() + 0.1 * entropy.sum()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    alone = [TrainingRow(prompt, (sample,)) for prompt, own in zip(prompts, samples, strict=True) for sample in own]
    expected, exact = gradients(alone, False)
    packed, found = gradients([TrainingRow(p, tuple(own)) for p, own in zip(prompts, samples, strict=True)], True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6  # transformers' norms compute in float32 in any case
    assert packed == pytest.approx(expected, rel=tolerance)
    assert found.keys() == exact.keys()
    scale = max(float(g.abs().max()) for g in exact.values())
    for name, gradient in exact.items():
        # Some are zero but for rounding: a bias of keys moves all scores of a query alike.
        difference = (found[name] - gradient).norm() / max(float(gradient.norm()), 1e-2 * scale)
        assert difference < tolerance, name


def several_turns(random: np.random.Generator, length: int) -> Sample:
    """A completion of which a third, in the middle, was said by somebody else."""
    trainable = torch.ones(length, dtype=torch.bool)
    trainable[length // 3 : 2 * (length // 3)] = False
    return Sample(
        token_ids=torch.from_numpy(random.integers(0, 250, length)),
        trainable=trainable,
        logprobs=torch.zeros(length),
        policy_versions=torch.zeros(length, dtype=torch.int32),
        advantage=float(random.normal()),
    )


@pytest.mark.parametrize("side", [4, 14, 26, 27, 70])
def test_patches_lie_where_vllm_puts_them(side: int) -> None:
    from vllm.model_executor.models.idefics2_vision_model import Idefics2VisionEmbeddings

    mask = torch.zeros(3, side, side, dtype=torch.bool)
    for image, (height, width) in enumerate([(side, side), (max(1, side // 3), side), (side, max(1, side - 3))]):
        mask[image, :height, :width] = True
    engine = SimpleNamespace(num_patches_per_side=side, position_embedding=SimpleNamespace(weight=torch.zeros(1)))
    assert torch.equal(patch_places(mask, side), Idefics2VisionEmbeddings.get_position_ids(engine, mask))


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "aria"])
def test_the_learners_tower_uses_these_places(family: str) -> None:
    """Told by embeddings of positions that are their own numbers."""
    adapter = adapter_of(family)
    base = load_policy(options(model_of(family)), adapter).model.base_model
    embeddings = (base.vision_tower if family == "aria" else base.vision_model).embeddings
    side = embeddings.num_patches_per_side
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None].expand(-1, embeddings.embed_dim))
        edge = side * embeddings.patch_size
        out = embeddings(torch.zeros(1, 3, edge, edge), torch.ones(1, side, side, dtype=torch.bool))
    assert out[0, :, 0].tolist() == list(range(side * side))


def test_a_step_in_time_is_rounded_as_in_vllm() -> None:
    """vLLM: numpy's float64 product, cut off. In float32, 27 x 1.4814815 would be 40 and not 39."""
    grid = torch.tensor([40, 1, 1])
    steps = [float(torch.tensor(2 / fps)) * 2.0 for fps in (1.35, 2.3, 3.7, 10.0 / 54 * 12)]
    for step in steps:
        kinds = torch.full((1, 40), 2)
        ours = mrope_positions(kinds, torch.ones_like(kinds), {2: iter([(grid, step)])})
        assert ours[0, 0].tolist() == (np.indices((40, 1, 1))[0] * step).astype(np.int64).flatten().tolist()


def test_an_image_beside_blank_lines_is_still_found_in_gemma3() -> None:
    adapter = adapter_of("gemma3")
    parts = [{"type": "text", "text": "a\n\n\n"}, {"type": "image"}, {"type": "text", "text": "\n\nb"}]
    text = adapter.render([{"role": "user", "content": parts}])
    assert "a\n<start_of_image>b" in text


def test_an_image_of_one_token_is_refused_by_mistral3() -> None:
    adapter = adapter_of("mistral3")
    place = [adapter.placeholder_ids["image"]]
    with pytest.raises(ValueError, match="single token"):
        adapter.expanded_length(place, [Media("image", "", b"", 20, 8)])
    assert adapter.expanded_length(place, [Media("image", "", b"", 56, 56)]) > 2


def test_sounds_that_are_too_long_or_too_short_are_refused() -> None:
    adapter = adapter_of("qwen2_5_omni")
    place = [adapter.placeholder_ids["audio"]]
    with pytest.raises(ValueError, match=r"the sound has 31 s; the model takes at most 30 s"):
        adapter.expanded_length(place, [Media("audio", "", b"", samples=31 * 16000)])
    with pytest.raises(MediaError, match=r"need at least 0\.1 s"):
        noise("audio", 0, seconds=0.05)


def test_a_window_of_attention_is_not_counted_over_siblings() -> None:
    adapter = adapter_of("qwen2")
    assert shares_prompts(adapter)
    windowed = copy.deepcopy(adapter)
    windowed.model_config.layer_types = ["sliding_attention", "full_attention"]
    assert not shares_prompts(windowed)


def test_a_model_that_nobody_knows_is_answered_with_those_that_are_known(tmp_path: Path) -> None:
    for model_type in ("nobodys_model", "gpt2"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        with pytest.raises(AdapterError, match=r"qwen2_5_vl.*package.module:Class.*docs/adapters.md"):
            load_adapter(str(tmp_path))
    with pytest.raises(AdapterError, match="not a subclass"):
        load_adapter(str(tmp_path), "pathlib:Path")
