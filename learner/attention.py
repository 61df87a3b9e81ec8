"""Several completions of one prompt in one row: who attends to whom, at which position, and who predicts whom.

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2 | pad        segments  0 0 0 1 1 2 2 2 -1
    positions  0  1  2    3  4    3  4  5                each completion continues from the prompt
    predicts        └──────┴─ a0, b0 both from p2        and sees the prompt and itself, never its siblings

Pure functions of `segments` int64 `[B, L]`: 0 at prompt tokens, k at tokens of the row's k-th completion, -1 at
padding. A row with a single completion is an ordinary causal sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared_prompt_mask(segments: Tensor) -> Tensor:
    """bool `[B, 1, L, L]`: True where the query (row) may see the key (column).

    Padding sees the first token alone: a query that sees nothing would be NaN."""
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((key == 0) | (key == query)) & (query >= 0)
    seen[:, :, 0] = True
    return seen[:, None]


def position_shift(segments: Tensor) -> Tensor:
    """int64 `[B, L]`: what to subtract from a token's position in the row, so that every completion follows the prompt
    directly: the lengths of the completions before its own."""
    start = _segment_start(segments)
    prompt_length = (segments == 0).sum(1, keepdim=True)
    return torch.where(segments > 0, start - prompt_length, 0)


def predicting_position(segments: Tensor) -> Tensor:
    """int64 `[B, L]`: the position whose hidden state predicts the token at t: t - 1, but the prompt's last token for
    the first of each completion. 0 at position 0, which nothing predicts."""
    before = torch.arange(segments.shape[1], device=segments.device).expand_as(segments) - 1
    first = (segments > 0) & (_segment_start(segments) == before + 1)
    last_of_prompt = (segments == 0).sum(1, keepdim=True) - 1
    return torch.where(first, last_of_prompt, before).clamp(min=0)


def _segment_start(segments: Tensor) -> Tensor:
    """int64 `[B, L]`: where the run of equal segments that holds t begins."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    changed = torch.ones_like(segments, dtype=torch.bool)
    changed[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(changed, index, 0).cummax(1).values
