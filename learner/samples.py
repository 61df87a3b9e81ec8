"""From scored groups to rows, and from rows to micro-batches.

RolloutGroup ──encode prompt once──▶ Row(prompt, samples that share it) ──collate──▶ MultimodalBatch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from learner.attention import position_shift
from learner.packing import share_prompt
from learner.types import EncodingMismatchError
from rollout.types import Completion, RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.clips import decode


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
    """A prompt and the completions laid behind it in one row of a batch."""

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
        ours, theirs = prompt.input_ids.numpy(), adapter.ids_from_engine(np.asarray(group.prompt_token_ids))
        if not np.array_equal(ours, theirs):
            raise EncodingMismatchError(_describe_mismatch(adapter, group, ours, theirs))
    return encoded


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


def make_rows(prompt: EncodedPrompt, samples: Sequence[Sample], break_even: int | None, budget: int) -> list[Row]:
    """Rows of one group: as many completions to a row as pay, and as fit `budget` tokens.

    `break_even` as in `share_prompt`; None: one completion a row."""
    if break_even is None:
        return [Row(prompt, (sample,)) for sample in samples]
    shared = share_prompt(len(prompt.input_ids), [len(s) for s in samples], break_even, budget)
    return [Row(prompt, tuple(samples[i] for i in members)) for members in shared]


def collate(rows: Sequence[Row], adapter: MultimodalAdapter) -> MultimodalBatch:
    """Rows padded on the right to the longest. Prompts that are the same object contribute their images once.

    No rows: a batch of one padding token without loss, for ranks that have fewer micro-batches than others."""
    pad = adapter.pad_token_id
    shape = (max(1, len(rows)), max((len(row) for row in rows), default=2))
    ids = torch.full(shape, pad, dtype=torch.int64)
    segments = torch.full(shape, -1, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    behavior, advantages, rewards = (torch.zeros(shape, dtype=torch.float32) for _ in range(3))
    versions = torch.full(shape, -1, dtype=torch.int32)
    for b, row in enumerate(rows):
        end = len(row.prompt.input_ids)
        ids[b, :end], segments[b, :end] = row.prompt.input_ids, 0
        for k, sample in enumerate(row.samples, start=1):
            at, end = slice(end, end + len(sample)), end + len(sample)
            ids[b, at], segments[b, at] = sample.token_ids, k
            trained = sample.trainable
            loss_mask[b, at] = trained
            behavior[b, at] = torch.where(trained, sample.logprobs, 0.0)
            advantages[b, at], rewards[b, at] = trained * sample.advantage, trained * sample.reward
            versions[b, at] = torch.where(trained, sample.policy_versions, -1)
    if not rows:
        segments[0] = 0
    distinct: dict[int, EncodedPrompt] = {id(row.prompt): row.prompt for row in rows}
    inputs = adapter.join(list(distinct.values()))
    index = _media_index(rows, distinct, adapter)
    attention_mask = (segments >= 0).to(torch.int64)
    positions = adapter.position_ids(ids, attention_mask, _at_places(inputs, index, adapter))
    return MultimodalBatch(
        input_ids=ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        segments=segments if any(len(row.samples) > 1 for row in rows) else None,
        position_ids=positions - position_shift(segments),
        behavior_logprobs=behavior,
        advantages=advantages,
        rewards=rewards,
        policy_versions=versions,
        pixel_values=inputs.pop("pixel_values", None),
        media_index=index,
        extra_model_kwargs={**inputs, **adapter.token_inputs(ids)},
    )


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
