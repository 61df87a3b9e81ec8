"""Count M-RoPE positions as vLLM does: time, height and width of an item start after the largest position before it.

Qwen2-VL (arXiv 2409.12191, section 2.1), Qwen2.5-VL (arXiv 2502.13923, section 2.1.3: time in seconds).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MediaGrid = tuple[Tensor, float]
"""Grid `[3]` of an item in tokens (time, height, width), and the number of positions of one step in time."""


def mrope_positions(kinds: Tensor, attention_mask: Tensor, items: Mapping[int, Iterator[MediaGrid]]) -> Tensor:
    """Return int64 `[3, B, L]`. `kinds` `[B, L]` is 0 at text, and the number of the kind at tokens of media. The
    `items` are in the order of their places, row by row. Padding gets 0.

    After an item, text continues at its largest position on any axis plus one. (transformers 5.19 continues after the
    larger of height and width, which is another position after a long video.)"""
    positions = torch.zeros(3, *kinds.shape, dtype=torch.int64)
    lengths = attention_mask.sum(1).tolist()
    for b, length in enumerate(lengths):
        at = following = 0
        for kind, run in itertools.groupby(kinds[b, :length].tolist()):
            end = at + len(list(run))
            while at < end:
                if kind == 0:
                    own = torch.arange(end - at).expand(3, -1)
                else:
                    grid, step = next(items[kind])
                    own = _grid_positions(grid, step)
                positions[:, b, at : at + own.shape[1]] = own + following
                following += int(own.max()) + 1
                at += own.shape[1]
    return positions.to(kinds.device)


def _grid_positions(grid: Tensor, step: float) -> Tensor:
    """Return int64 `[3, t h w]`, computed in float64 as in vLLM; float32 would round some steps differently."""
    time, height, width = torch.meshgrid(*(torch.arange(int(n)) for n in grid), indexing="ij")
    return torch.stack([(time.double() * step).to(torch.int64), height, width]).flatten(1)
