"""From rows to a micro-batch, packed or padded.

rows ─ collate_packed ─▶ one row without padding [1, T]
     ─ collate_padded ─▶ a row each, filled up to the longest [B, L]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from learner.batching.layout import position_shift
from learner.batching.rows import TrainingRow, shares_prompts
from vlm.adapter import EncodedPrompt, MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind


@dataclass(frozen=True)
class CachedMedia:
    """The cached values that all batches of a run use."""

    features: Sequence[MediaKind] = ()
    """Kinds whose features are cached."""
    dummy_outputs: Mapping[MediaKind, FeatureRow] = field(default_factory=dict)
    """Kinds whose tower outputs are cached, with those of the dummy item that a batch without the kind is given."""


@dataclass(frozen=True)
class _Tokens:
    """The token-aligned tensors of a row, all `[T]`."""

    ids: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor

    @classmethod
    def of(cls, row: TrainingRow) -> _Tokens:
        prompt, samples = row.prompt.input_ids, row.samples
        zeros = torch.zeros(len(prompt))
        return cls(
            ids=torch.cat([prompt, *(s.token_ids for s in samples)]),
            loss_mask=torch.cat([zeros.bool(), *(s.trainable for s in samples)]),
            behavior_logprobs=torch.cat([zeros, *(torch.where(s.trainable, s.logprobs, 0.0) for s in samples)]),
            advantages=torch.cat([zeros, *(s.trainable * s.advantage for s in samples)]),
        )


def collate(
    rows: Sequence[TrainingRow], adapter: MultimodalAdapter, cached: CachedMedia | None = None
) -> MultimodalBatch:
    """A packed batch if the family can share prompts, else a padded one. A prompt object that stands in several rows
    contributes its media once.

    No rows: a batch of two padding tokens without loss, for ranks that have fewer micro-batches than others."""
    return (collate_packed if shares_prompts(adapter) else collate_padded)(rows, adapter, cached)


def collate_packed(
    rows: Sequence[TrainingRow], adapter: MultimodalAdapter, cached: CachedMedia | None = None
) -> MultimodalBatch:
    """All rows end to end in one, without padding."""
    rows = rows or [_padding_row(adapter)]
    tokens = [_Tokens.of(row) for row in rows]
    ids = torch.cat([own.ids for own in tokens])[None]
    groups = tuple((len(row.prompt.input_ids), tuple(map(len, row.samples))) for row in rows)
    positions = [
        adapter.position_ids(own.ids[None], torch.ones_like(own.ids[None]), row.prompt.inputs)
        for own, row in zip(tokens, rows, strict=True)
    ]
    batch = MultimodalBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        loss_mask=torch.cat([own.loss_mask for own in tokens])[None],
        groups=groups,
        position_ids=torch.cat(positions, dim=-1) - position_shift(groups),
        behavior_logprobs=torch.cat([own.behavior_logprobs for own in tokens])[None],
        advantages=torch.cat([own.advantages for own in tokens])[None],
    )
    return _with_media(batch, rows, adapter, cached or CachedMedia())


def collate_padded(
    rows: Sequence[TrainingRow], adapter: MultimodalAdapter, cached: CachedMedia | None = None
) -> MultimodalBatch:
    """A row of the batch for each row, padded on the right to the longest."""
    rows = rows or [_padding_row(adapter)]
    tokens = [_Tokens.of(row) for row in rows]
    ids = pad_sequence([own.ids for own in tokens], batch_first=True, padding_value=adapter.pad_token_id)
    mask = pad_sequence([torch.ones_like(own.ids) for own in tokens], batch_first=True)
    batch = MultimodalBatch(
        input_ids=ids,
        attention_mask=mask,
        loss_mask=pad_sequence([own.loss_mask for own in tokens], batch_first=True),
        position_ids=adapter.position_ids(ids, mask, _position_inputs(rows, adapter)),
        behavior_logprobs=pad_sequence([own.behavior_logprobs for own in tokens], batch_first=True),
        advantages=pad_sequence([own.advantages for own in tokens], batch_first=True),
    )
    return _with_media(batch, rows, adapter, cached or CachedMedia())


def _padding_row(adapter: MultimodalAdapter) -> TrainingRow:
    return TrainingRow(EncodedPrompt(torch.full((2,), adapter.pad_token_id)), ())


def _position_inputs(rows: Sequence[TrainingRow], adapter: MultimodalAdapter) -> dict[str, Tensor]:
    """The inputs that positions derive from, one entry per place, in the order of the rows."""
    names = {name for modality in adapter.modalities.values() for name in modality.positions}
    own = [{name: value for name, value in row.prompt.inputs.items() if name in names} for row in rows]
    return adapter.join([replace(row.prompt, inputs=inputs) for row, inputs in zip(rows, own, strict=True)])


def _with_media(
    batch: MultimodalBatch, rows: Sequence[TrainingRow], adapter: MultimodalAdapter, cached: CachedMedia
) -> MultimodalBatch:
    """The batch with the media of its distinct prompts: pixels, or what is cached of them."""
    distinct = {id(row.prompt): row.prompt for row in rows}
    inputs = adapter.join(list(distinct.values()))

    def cached_rows(kind: MediaKind) -> tuple[FeatureRow, ...]:
        return tuple(row for prompt in distinct.values() for row in prompt.cached.get(kind, ()))

    return replace(
        batch,
        pixel_values=inputs.pop("pixel_values", None),
        media_index=_media_index(rows, distinct, adapter),
        cached_features={kind: cached_rows(kind) for kind in cached.features},
        cached_tower_outputs={k: cached_rows(k) or (dummy,) for k, dummy in cached.dummy_outputs.items()},
        extra_model_kwargs={**inputs, **adapter.token_inputs(batch.input_ids)},
    )


def _media_index(
    rows: Sequence[TrainingRow], distinct: Mapping[int, EncodedPrompt], adapter: MultimodalAdapter
) -> dict[str, Tensor]:
    """For each kind, which of the distinct features stands at each place, in the order of the rows. Empty where every
    feature has one place."""
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
