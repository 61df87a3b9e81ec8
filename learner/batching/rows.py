"""From groups to rows: prompts are encoded, and completions are laid behind them.

RolloutGroup ─ encode_prompts ─▶ EncodedPrompt ─┐
             ─ to_sample ──────▶ Samples ───────┴─ make_rows ─▶ Rows ─▶ collate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.batching.packing import split_group
from learner.types import EncodingMismatchError, LearnerOptions, Size
from rollout.types import Completion, RolloutGroup
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.media.video_audio import decode
from vlm.media_cost import patches


class StalenessError(AssertionError):
    """A token was sampled by weights older than allowed, or newer than the learner's: a defect of admission."""


@dataclass(frozen=True)
class Sample:
    """One completion, all tensors `[T]`."""

    token_ids: Tensor
    trainable: Tensor
    """bool: the policy sampled the token, so it is part of the loss."""
    logprobs: Tensor
    """float32, as sampled; 0 where not trainable."""
    policy_versions: Tensor
    """int32: the weights that sampled each token."""
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class TrainingRow:
    """A prompt and the completions laid behind it: all of a group, some of a large group, or one."""

    prompt: EncodedPrompt
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.prompt.input_ids) + sum(len(s) for s in self.samples)


def to_sample(completion: Completion, advantage: float = 0.0) -> Sample:
    """Join the tokens of all segments in order. Raises ValueError for media inside a completion."""
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
    )


def encode_prompts(
    adapter: MultimodalAdapter, groups: Sequence[RolloutGroup], media: Mapping[str, bytes]
) -> list[EncodedPrompt]:
    """Encode the prompt of each group as the model takes it. `media`: encoded bytes by digest.

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
    """Whether the completions of a group are laid behind one copy of their prompt. They are not where an attention
    window (or chunk) would span siblings."""
    text = adapter.model_config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    plain = {*kinds} == {"full_attention"} if kinds else getattr(text, "sliding_window", None) is None
    return adapter.shares_prompts and plain


def layout(adapter: MultimodalAdapter) -> str:
    """The layout of micro-batches, in a line for the user."""
    if shares_prompts(adapter):
        return "micro-batches are packed, and each prompt is computed once for all completions of its group"
    return (
        "micro-batches are padded, and the prompt is computed for each completion, because not every layer of the "
        f"model is plainly causal ({type(adapter).__name__})"
    )


def make_rows(
    prompt: EncodedPrompt,
    samples: Sequence[Sample],
    adapter: MultimodalAdapter,
    options: LearnerOptions,
    *,
    shared: bool | None = None,
) -> list[TrainingRow]:
    """Make the rows of one group. If `shared` (None: if the family can), all completions are laid behind one prompt, or
    in as few parts as fit a micro-batch of `options`; else each is a row of its own. Raises ValueError for a completion
    that does not fit alone."""
    first = options.size(len(prompt.input_ids), patches(adapter, prompt), 0)
    own = [options.size(len(s), 0, int(s.trainable.sum())) for s in samples]
    parts = split_group(first, own, options.micro_batch)
    if not (shares_prompts(adapter) if shared is None else shared):
        parts = [[i] for i in range(len(samples))]
    return [TrainingRow(prompt, tuple(samples[i] for i in members)) for members in parts]


def size_of(row: TrainingRow, adapter: MultimodalAdapter, options: LearnerOptions) -> Size:
    return options.size(len(row), patches(adapter, row.prompt), sum(int(s.trainable.sum()) for s in row.samples))


def token_lags(samples: Sequence[Sample], version: int, max_staleness: int) -> tuple[int, int]:
    """Sum and maximum, over trained tokens, of how many versions they lag behind `version`. Raises StalenessError."""
    lags = [version - s.policy_versions[s.trainable].numpy() for s in samples]
    lag = np.concatenate(lags) if lags else np.zeros(0, np.int64)
    if lag.size == 0:
        return 0, 0
    if lag.max() > max_staleness or lag.min() < 0:
        raise StalenessError(
            f"tokens sampled by versions {version - lag.max()} to {version - lag.min()} cannot train version {version} "
            f"with max_staleness={max_staleness}"
        )
    return int(lag.sum()), int(lag.max())
