"""From scored groups to batches: alignment, masks, shared images, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batching.collate import collate, collate_padded
from learner.batching.rows import (
    StalenessError,
    TrainingRow,
    encode_prompts,
    make_rows,
    size_of,
    to_sample,
    token_lags,
)
from learner.types import EncodingMismatchError, LearnerOptions
from rollout.types import Completion, Segment
from tests.helpers.learner_cases import adapter_of, changed, make_case, make_group, mixed_case, options, rows_of
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import ModelConfig
from vlm.tiny.noise import noise_image


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> MultimodalAdapter:
    return adapter_of(tiny_model)


@pytest.fixture
def chosen(tiny_model: Path) -> LearnerOptions:
    return options(tiny_model)


ROOM = LearnerOptions(ModelConfig(""), 1)


def mixed_rows(adapter: MultimodalAdapter, chosen: LearnerOptions) -> list[TrainingRow]:
    case = mixed_case(adapter)
    return rows_of(adapter, chosen, case)


def test_a_batch_holds_exactly_the_sampled_tokens(adapter: MultimodalAdapter, chosen: LearnerOptions):
    case = mixed_case(adapter)
    batch = collate(rows_of(adapter, chosen, case), adapter)
    found = sorted(
        zip(
            batch.input_ids[batch.loss_mask].tolist(),
            batch.behavior_logprobs[batch.loss_mask].tolist(),  # type: ignore[index]
            batch.advantages[batch.loss_mask].tolist(),  # type: ignore[index]
            strict=True,
        )
    )
    expected = []
    for group, advantages in zip(case.groups, case.advantages, strict=True):
        assert group.verdicts is not None
        for completion, advantage, verdict in zip(group.completions, advantages, group.verdicts, strict=True):
            for segment in completion.segments if verdict.valid else ():
                assert segment.logprobs is not None
                for token, logprob in zip(segment.token_ids, segment.logprobs, strict=True):
                    expected.append((int(token), float(logprob), float(np.float32(advantage))))
    assert found == sorted(expected)
    outside = ~batch.loss_mask
    assert batch.behavior_logprobs is not None and (batch.behavior_logprobs[outside] == 0).all()


def test_siblings_share_one_prompt_and_one_image(adapter: MultimodalAdapter, chosen: LearnerOptions):
    rows = mixed_rows(adapter, chosen)
    assert [len(row.samples) for row in rows] == [3, 4, 4, 4]
    batch = collate(rows, adapter)
    assert batch.extra_model_kwargs["image_grid_thw"].shape == (4, 3) and not batch.media_index


def test_rows_of_one_prompt_name_its_images_again(adapter: MultimodalAdapter):
    rows = []
    for seed, images in ((0, 1), (1, 0), (2, 2)):
        group = make_group(adapter, seed, images=images)
        (prompt,) = encode_prompts(adapter, [group], {m.digest: m.data for m in group.prompt.media})
        rows += make_rows(prompt, [to_sample(c) for c in group.completions[:2]], adapter, ROOM, shared=False)
    packed = collate(rows, adapter)
    assert packed.num_rows == 1 and packed.media_index["image"].tolist() == [0, 0, 1, 2, 1, 2]
    batch = collate_padded(rows, adapter)
    assert batch.groups is None and batch.num_rows == 6
    assert batch.media_index["image"].tolist() == [0, 0, 1, 2, 1, 2]
    assert batch.extra_model_kwargs["image_grid_thw"].shape == (3, 3)


def test_a_batch_of_the_processor_equals_one_call_each(adapter: MultimodalAdapter):
    groups = [make_group(adapter, seed, images=seed % 3) for seed in range(5)]
    case = make_case(groups)
    together = encode_prompts(adapter, groups, case.media)
    for group, prompt in zip(groups, together, strict=True):
        (alone,) = encode_prompts(adapter, [group], case.media)
        assert torch.equal(prompt.input_ids, alone.input_ids)
        assert prompt.counts.get("image", 0) == len(group.prompt.media)
        assert prompt.inputs.keys() == alone.inputs.keys()
        assert all(torch.equal(value, alone.inputs[name]) for name, value in prompt.inputs.items())


def test_other_prompt_tokens_than_the_engines_are_refused(adapter: MultimodalAdapter):
    group = make_group(adapter, 0)
    ids = group.prompt_token_ids.copy()
    ids[5] += 1
    media = {m.digest: m.data for m in group.prompt.media}
    with pytest.raises(EncodingMismatchError, match=r"QwenVLAdapter.*test:0.*first at position 5"):
        encode_prompts(adapter, [replace(group, prompt_token_ids=ids)], media)
    with pytest.raises(EncodingMismatchError, match=r"engine no token; lengths \d+ and 4"):
        encode_prompts(adapter, [replace(group, prompt_token_ids=group.prompt_token_ids[:4])], media)


def test_tokens_that_no_policy_sampled_are_context_not_trained():
    asked = Segment(np.array([5, 6], np.int32), np.array([-1.0, -2.0], np.float32), np.array([3, 3], np.int32))
    tool = Segment(np.array([7], np.int32), None, np.array([3], np.int32), trainable=False)
    sample = to_sample(Completion((asked, tool, asked), "", "stop", 0))
    assert sample.token_ids.tolist() == [5, 6, 7, 5, 6]
    assert sample.trainable.tolist() == [True, True, False, True, True]
    assert sample.logprobs.tolist() == [-1.0, -2.0, 0.0, -1.0, -2.0]


def test_media_inside_a_completion_is_refused():
    image = noise_image(0)
    shown = Segment(np.array([1], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), media=(image,))
    with pytest.raises(ValueError, match="media of its own"):
        to_sample(Completion((shown,), "", "stop", 0))


def test_a_batch_without_rows_is_one_padding_row(adapter: MultimodalAdapter):
    batch = collate([], adapter)
    assert batch.num_rows == 1 and not batch.loss_mask.any() and batch.attention_mask.all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 20), st.booleans(), st.integers(0, 30))
def test_rows_hold_every_sample_once_within_the_limits(
    adapter: MultimodalAdapter, lengths: list[int], prompt_length: int, shared: bool, spare: int
):
    most = prompt_length + max(lengths) + spare
    limits = changed(ROOM, micro_batch=most)
    prompt = EncodedPrompt(torch.zeros(prompt_length, dtype=torch.int64))
    segments = [Segment(np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros(n, np.int32)) for n in lengths]
    samples = [to_sample(Completion((s,), "", "stop", 0)) for s in segments]
    rows = make_rows(prompt, samples, adapter, limits, shared=shared)
    assert sorted(id(s) for row in rows for s in row.samples) == sorted(id(s) for s in samples)
    assert all(
        (np.array(size_of(row, adapter, limits)) <= limits.micro_batch).all() and row.prompt is prompt for row in rows
    )
    if not shared:
        assert all(len(row.samples) == 1 for row in rows)


def test_staleness_is_counted_over_tokens_and_bounded(adapter: MultimodalAdapter):
    old, new = (to_sample(make_group(adapter, 0, version=v).completions[0]) for v in (4, 5))
    count = len(old)
    assert token_lags([old, new], version=6, max_staleness=2) == (2 * count + count, 2)
    assert token_lags([], version=6, max_staleness=0) == (0, 0)
    with pytest.raises(StalenessError, match=r"versions 4 to 5 cannot train version 6 with max_staleness=1"):
        token_lags([old, new], version=6, max_staleness=1)
    with pytest.raises(StalenessError, match="version 3"):
        token_lags([old], version=3, max_staleness=9)


def test_the_batch_refuses_fields_of_another_shape(adapter: MultimodalAdapter, chosen: LearnerOptions):
    batch = collate(mixed_rows(adapter, chosen), adapter)
    with pytest.raises(ValueError, match="advantages has shape"):
        replace(batch, advantages=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="position 0"):
        MultimodalBatch(batch.input_ids, batch.attention_mask, torch.ones_like(batch.loss_mask))
