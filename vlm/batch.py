"""MultimodalBatch: the input of one forward and backward pass. No field belongs to one model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind

GroupLengths = tuple[int, tuple[int, ...]]
"""Number of tokens of a group's prompt, and of each completion after it."""

_TOKEN_ALIGNED = (
    *("attention_mask", "loss_mask", "behavior_logprobs", "advantages", "before_logprobs", "reference_logprobs"),
)
_MODEL_INPUTS = ("pixel_values", "cached_features", "cached_tower_outputs", "extra_model_kwargs")


@dataclass(frozen=True)
class MultimodalBatch:
    """A micro-batch, in one of two layouts. Packed (`groups` is set): one row `[1, L]` without padding, of groups end
    to end, each a prompt and the completions that share it. Padded: B rows, each a prompt with one completion, filled
    up on the right to L tokens.

    Token-aligned fields are aligned with `input_ids`: entry `[b, t]` speaks of the token *at* position t, which the
    model predicts from the position before it in its completion. `loss_mask[:, 0]` is therefore always False.
    """

    input_ids: Tensor
    """int64 `[B, L]`: expanded prompt, then its completion(s)."""
    attention_mask: Tensor
    """int64 `[B, L]`: 1 for tokens, 0 for padding."""
    loss_mask: Tensor
    """bool `[B, L]`: sampled tokens of valid completions, the only ones with a gradient."""
    groups: tuple[GroupLengths, ...] | None = None
    """Packed: what lies in the row. A completion sees its prompt and itself, and no more. None: padded."""
    position_ids: Tensor | None = None
    """int64 `[B, L]`, or `[3, B, L]` for M-RoPE, as the engine counts them; None: the model derives them."""
    behavior_logprobs: Tensor | None = None
    """float32 `[B, L]`: as sampled by the engine; 0 outside `loss_mask`."""
    advantages: Tensor | None = None
    """float32 `[B, L]`: 0 outside `loss_mask`."""
    before_logprobs: Tensor | None = None
    """float32 `[B, L]`: under the learner's policy before the first of several steps; 0 outside `loss_mask`."""
    reference_logprobs: Tensor | None = None
    """float32 `[B, L]`: under the frozen reference policy; 0 outside `loss_mask`."""
    pixel_values: Tensor | None = None
    """The family's own layout (patch rows `[P, D]`, or images `[N, C, H, W]`): each prompt's images once."""
    media_index: Mapping[str, Tensor] = field(default_factory=dict)
    """Kind -> int64 `[N]`: the index of the features (one per item, or per tile) at the n-th place, in the order of the
    rows. A kind without an entry has one place per item, in order."""
    cached_features: Mapping[MediaKind, tuple[FeatureRow, ...]] = field(default_factory=dict)
    """Features that take the place of pixels, by kind, one row per distinct item (or tile). A kind whose features are
    cached is always here, with no rows if the batch has no item of it: its tower then runs on no rank."""
    cached_tower_outputs: Mapping[MediaKind, tuple[FeatureRow, ...]] = field(default_factory=dict)
    """Tower outputs that come with the pixels, by kind, one row per item: the projector alone runs. A batch without
    an item of such a kind has the tower outputs of the dummy item that it will be given."""
    extra_model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the model takes, by its own names: `image_grid_thw`, `image_sizes`, `pixel_attention_mask`;
    `pixel_values_videos`, `video_grid_thw`; `input_features`, `feature_attention_mask`; token-aligned inputs, `[B, L]`.
    """

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name in _TOKEN_ALIGNED:
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, input_ids {tuple(shape)}")
        if self.groups is not None and (sum(p + sum(own) for p, own in self.groups), 1) != (shape[1], shape[0]):
            raise ValueError(f"groups of {self.groups} tokens in a batch of shape {tuple(shape)}")
        if bool(self.loss_mask[:, :1].any()):
            raise ValueError("loss_mask marks position 0, which no token predicts")

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Token positions computed, padding included: B x L."""
        return self.input_ids.numel()

    def completion_labels(self) -> Tensor:
        """int64 `[B, L]`: equal at the tokens of one completion, different between completions."""
        device = self.input_ids.device
        if self.groups is None:
            return torch.arange(self.num_rows, device=device)[:, None].expand_as(self.input_ids)
        lengths = torch.tensor([n for prompt, own in self.groups for n in (prompt, *own)], device=device)
        return torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]

    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the Hugging Face model's forward."""
        kwargs: dict[str, Any] = dict(self.extra_model_kwargs)
        kwargs.update(input_ids=self.input_ids, attention_mask=self.attention_mask)
        if self.position_ids is not None:
            kwargs["position_ids"] = self.position_ids
        if self.pixel_values is not None:
            kwargs["pixel_values"] = self.pixel_values
        return kwargs

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> MultimodalBatch:
        """Move to `device`; `dtype` applies to the model's floating-point inputs (pixels, what is cached of media), not
        to log-probabilities."""

        def move(value: Any, cast: bool) -> Any:
            if not isinstance(value, Tensor):
                return value
            convert = dtype if cast and dtype is not None and value.is_floating_point() else None
            return value.to(device=device, dtype=convert, non_blocking=True)

        values = {f.name: (getattr(self, f.name), f.name in _MODEL_INPUTS) for f in fields(self)}
        return replace(self, **{n: tree_map(partial(move, cast=cast), value) for n, (value, cast) in values.items()})
