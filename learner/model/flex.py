"""Attention over blocks of pairs on GPUs: torch's `flex_attention`, compiled, and the mask of blocks that it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

FLEX_BLOCK = 128
"""Side of the blocks of pairs that flex_attention skips or takes whole."""
FLEX_VARIANTS = 32
"""Compiled variants of flex_attention beyond which something is wrong, and a run stops. torch's default is 8."""
MASK_CHUNK = 2**24
"""Pairs of tokens whose visibility `block_mask_of` holds at once."""


def block_mask_of(seen: Callable[..., Tensor], length: int, device: torch.device) -> BlockMask:
    """Which blocks of FLEX_BLOCK x FLEX_BLOCK pairs have some, and which all pairs that see each other; `length` is a
    multiple of it. `torch`'s `create_block_mask` gives the same, and holds all `length`^2 pairs at once
    for that; here it is MASK_CHUNK of them, or a row of blocks."""
    blocks = length // FLEX_BLOCK
    some, every = torch.zeros(2, 1, 1, blocks, blocks, dtype=torch.bool, device=device)
    places, none = torch.arange(length, device=device), torch.zeros((), dtype=torch.int64, device=device)
    taken = max(1, MASK_CHUNK // (FLEX_BLOCK * length))
    for start in range(0, blocks, taken):
        rows = slice(start, min(start + taken, blocks))
        queries = places[rows.start * FLEX_BLOCK : rows.stop * FLEX_BLOCK]
        pairs = seen(none, none, queries[:, None], places).view(-1, FLEX_BLOCK, blocks, FLEX_BLOCK)
        some[0, 0, rows], every[0, 0, rows] = pairs.any(3).any(1), pairs.all(3).all(1)
    ordered = [
        (kind.sum(-1, dtype=torch.int32), kind.int().argsort(dim=-1, descending=True, stable=True).int())
        for kind in (some & ~every, every)
    ]
    return BlockMask.from_kv_blocks(
        *ordered[0], *ordered[1], BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def flex_length(tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // FLEX_BLOCK) * FLEX_BLOCK


@cache
def compiled_flex(backend: str = "inductor") -> Callable[..., Tensor]:
    """`flex_attention` for any length. One variant too many is an error: uncompiled it would hold all pairs' scores."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_VARIANTS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float) -> Tensor:
    """Every variant of strides and of gradients is compiled separately: inputs are made contiguous, and the pass
    without gradients is the same where gradients are off and where no input has one."""
    length = query.shape[2]
    filled = [pad(x, (0, 0, 0, flex_length(length) - length)).contiguous() for x in (query, key, value)]
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in filled)
    with torch.set_grad_enabled(needed):
        out = compiled_flex()(*filled, block_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
    return out[:, :, :length].transpose(1, 2)
