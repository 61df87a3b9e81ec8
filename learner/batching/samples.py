"""From scored groups to rows, and from rows to micro-batches.

RolloutGroup ──encode prompt once──▶ Row(prompt, samples behind it) ──collate──▶ MultimodalBatch, packed or padded
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.batching.layout import position_shift
from learner.batching.packing import split_group
from learner.types import EncodingMismatchError, LearnerOptions, Size
from rollout.types import Completion, RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import GroupLengths, MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind
from vlm.media.video_audio import decode
from vlm.media_cost import patches


@dataclass(frozen=True)
class Sample:
    """One completion, all tensors `[T]`."""

    token_ids: Tensor
    trainable: Tensor
    """bool: sampled by a policy, so part of the loss."""
    logprobs: Tensor
    """float32, as sampled; 0 where not trainable."""
    policy_versions: Tensor
    """int32"""
    advantage: float = 0.0
    reward: float = 0.0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Row:
    """A prompt and the completions laid behind it: a group, part of a large one, or one completion."""

    prompt: EncodedPrompt
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.prompt.input_ids) + sum(len(s) for s in self.samples)


def to_sample(completion: Completion, advantage: float = 0.0, reward: float = 0.0) -> Sample:
    """The tokens of all segments in order. Raises ValueError for media inside a completion."""
    if any(segment.media for segment in completion.segments):
        raise ValueError("a completion with media of its own (images returned by a tool) cannot be trained on yet")
    parts = completion.segments
    zeros = [
        np.zeros(len(s.token_ids), np.float32) if s.logprobs is None or not s.trainable else s.logprobs for s in parts
    ]
    return Sample(
        token_ids=torch.from_numpy(np.concatenate([s.token_ids for s in parts]).astype(np.int64)),
        trainable=torch.from_numpy(np.concatenate([np.full(len(s.token_ids), s.trainable) for s in parts])),
        logprobs=torch.from_numpy(np.concatenate(zeros).astype(np.float32)),
        policy_versions=torch.from_numpy(np.concatenate([s.policy_versions for s in parts]).astype(np.int32)),
        advantage=advantage,
        reward=reward,
    )


def encode_prompts(
    adapter: MultimodalAdapter, groups: Sequence[RolloutGroup], media: Mapping[str, bytes]
) -> list[EncodedPrompt]:
    """Each group's prompt as the model takes it, once per group. `media`: encoded bytes by digest.

    Raises EncodingMismatchError where the engine attended to other tokens than the processor makes of the same
    prompt: log-probabilities of different inputs cannot be compared, and no gradient would be right."""
    encoded = adapter.encode_batch(
        [g.prompt.text for g in groups], [[decode(m, media[m.digest]) for m in g.prompt.media] for g in groups]
    )
    for group, prompt in zip(groups, encoded, strict=True):
        check_expansion(adapter, group, prompt)
    return encoded


def check_expansion(adapter: MultimodalAdapter, group: RolloutGroup, prompt: EncodedPrompt) -> None:
    """Raises EncodingMismatchError unless `prompt` has the tokens that the engine attended to."""
    ours, theirs = prompt.input_ids.numpy(), adapter.ids_from_engine(np.asarray(group.prompt_token_ids))
    if not np.array_equal(ours, theirs):
        raise EncodingMismatchError(_describe_mismatch(adapter, group, ours, theirs))


def _describe_mismatch(adapter: MultimodalAdapter, group: RolloutGroup, ours: np.ndarray, theirs: np.ndarray) -> str:
    shared = min(len(ours), len(theirs))
    different = np.flatnonzero(ours[:shared] != theirs[:shared])
    at = int(different[0]) if len(different) else shared
    token = adapter.tokenizer.convert_ids_to_tokens

    def name(ids: np.ndarray) -> str:
        return f"{ids[at]} ({token(int(ids[at]))!r})" if at < len(ids) else "no token"

    return (
        f"family {type(adapter).__name__}: the learner's processor and engine {group.engine or '?'} expand prompt "
        f"{group.prompt.ref} differently: first at position {at}, learner {name(ours)}, engine {name(theirs)}; "
        f"lengths {len(ours)} and {len(theirs)}. Both must load the same tokenizer and image processor"
    )


def shares_prompts(adapter: MultimodalAdapter) -> bool:
    """Whether completions are laid behind one copy of their prompt. Not where a window or chunk of attention would be
    counted over siblings."""
    text = adapter.model_config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    plain = {*kinds} == {"full_attention"} if kinds else getattr(text, "sliding_window", None) is None
    return adapter.shares_prompts and plain


def layout(adapter: MultimodalAdapter) -> str:
    """What becomes of a group, for the user."""
    if shares_prompts(adapter):
        return "packed micro-batches, each prompt once for all completions of its group"
    return (
        "padded micro-batches, the prompt once for each completion: not every layer of the model is plainly causal "
        f"({type(adapter).__name__})"
    )


def make_rows(
    prompt: EncodedPrompt,
    samples: Sequence[Sample],
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    *,
    shared: bool | None = None,
) -> list[Row]:
    """Rows of one group: all completions behind one prompt if they fit a micro-batch of `options`, else as few parts as
    do; one completion each unless `shared` (None: if the family can). Raises ValueError where one alone does not fit.
    """
    first = options.size(len(prompt.input_ids), patches(adapter, prompt), 0)
    own = [options.size(len(s), 0, int(s.trainable.sum())) for s in samples]
    parts = split_group(first, own, options.micro_batch)
    if not (shares_prompts(adapter) if shared is None else shared):
        parts = [[i] for i in range(len(samples))]
    return [Row(prompt, tuple(samples[i] for i in members)) for members in parts]


def size_of(row: Row, adapter: MultimodalAdapter, options: LearnerOptions) -> Size:
    return options.size(len(row), patches(adapter, row.prompt), sum(int(s.trainable.sum()) for s in row.samples))


def collate(
    rows: Sequence[Row],
    adapter: MultimodalAdapter,
    *,
    packed: bool | None = None,
    precomputed: Sequence[MediaKind] = (),
    replayed: Mapping[MediaKind, FeatureRow] = MappingProxyType({}),
) -> MultimodalBatch:
    """Rows end to end if `packed` (None: if the family can), else padded on the right to the longest. Prompts that are
    the same object contribute their images once. `precomputed`: kinds whose features the prompts carry. `replayed`:
    kinds of which they carry, beside pixels, what the tower gives to the projector; and what it gives for the dummy
    that a batch without that kind will get.

    No rows: a batch of two padding tokens without loss, for ranks that have fewer micro-batches than others."""
    shape = (max(1, len(rows)), max((len(row) for row in rows), default=2))
    ids = torch.full(shape, adapter.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    behavior, advantages, rewards = (torch.zeros(shape, dtype=torch.float32) for _ in range(3))
    versions = torch.full(shape, -1, dtype=torch.int32)
    for b, row in enumerate(rows):
        end = len(row.prompt.input_ids)
        ids[b, :end], attention_mask[b, : len(row)] = row.prompt.input_ids, 1
        for sample in row.samples:
            at, end = slice(end, end + len(sample)), end + len(sample)
            ids[b, at] = sample.token_ids
            trained = sample.trainable
            loss_mask[b, at] = trained
            behavior[b, at] = torch.where(trained, sample.logprobs, 0.0)
            advantages[b, at], rewards[b, at] = trained * sample.advantage, trained * sample.reward
            versions[b, at] = torch.where(trained, sample.policy_versions, -1)
    if not rows:
        attention_mask[0] = 1
    distinct: dict[int, EncodedPrompt] = {id(row.prompt): row.prompt for row in rows}
    inputs = adapter.join(list(distinct.values()))
    index = _media_index(rows, distinct, adapter)
    positions = adapter.position_ids(ids, attention_mask, _at_places(inputs, index, adapter))
    groups: tuple[GroupLengths, ...] | None = None
    if shares_prompts(adapter) if packed is None else packed:
        groups = tuple((len(row.prompt.input_ids), tuple(map(len, row.samples))) for row in rows) or ((2, ()),)
        real = attention_mask.bool()
        positions = positions[..., real].unsqueeze(-2) - position_shift(groups)
        ids, attention_mask, loss_mask, behavior, advantages, rewards, versions = (
            x[real][None] for x in (ids, attention_mask, loss_mask, behavior, advantages, rewards, versions)
        )
    return MultimodalBatch(
        input_ids=ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        groups=groups,
        position_ids=positions,
        behavior_logprobs=behavior,
        advantages=advantages,
        rewards=rewards,
        policy_versions=versions,
        pixel_values=inputs.pop("pixel_values", None),
        media_index=index,
        extra_model_kwargs={
            **inputs,
            **adapter.token_inputs(ids),
            **_features(distinct, precomputed, replayed, adapter),
        },
    )


def _features(
    distinct: Mapping[int, EncodedPrompt],
    precomputed: Sequence[MediaKind],
    replayed: Mapping[MediaKind, FeatureRow],
    adapter: MultimodalAdapter,
) -> dict[str, Any]:
    """What the batch carries in place of pixels, and beside them."""

    def rows(kind: MediaKind) -> list[FeatureRow]:
        return [row for prompt in distinct.values() for row in prompt.features.get(kind, ())]

    carried: dict[str, Any] = {}
    if precomputed:
        carried["mm_encoder_outputs"] = {
            k: adapter.join_features(own) if (own := rows(k)) else None for k in precomputed
        }
    if replayed:
        carried["tower_outputs"] = {kind: rows(kind) or [dummy] for kind, dummy in replayed.items()}
    return carried


def _media_index(
    rows: Sequence[Row], distinct: Mapping[int, EncodedPrompt], adapter: MultimodalAdapter
) -> dict[str, Tensor]:
    """By kind: places of features, in the order of the rows, to the distinct ones. Empty where each has one place."""
    if len(distinct) == len(rows):
        return {}
    index: dict[str, Tensor] = {}
    for kind in adapter.towers():
        count = {key: adapter.feature_rows(prompt, kind) for key, prompt in distinct.items()}
        if any(count.values()):
            first = dict(zip(count, accumulate(count.values(), initial=0), strict=False))
            places = [first[id(row.prompt)] + i for row in rows for i in range(count[id(row.prompt)])]
            index[kind] = torch.tensor(places, dtype=torch.int64)
    return index


def _at_places(
    inputs: Mapping[str, Tensor], index: Mapping[str, Tensor], adapter: MultimodalAdapter
) -> dict[str, Tensor]:
    """The inputs that positions derive from, one entry per place."""
    return {
        name: inputs[name][index[kind]] if kind in index else inputs[name]
        for kind, modality in adapter.modalities.items()
        for name in modality.positions
        if name in inputs
    }
