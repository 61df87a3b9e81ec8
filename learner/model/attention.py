"""Attention within a packed row: groups end to end, each a prompt and the completions that share it.

    tokens     p0 p1 p2 │ a0 a1 │ b0 b1 b2 ║ q0 q1 │ c0 ...
    positions  0  1  2    3  4    3  4  5    0  1    2        each completion continues from its prompt
    predicted  -  p0 p1   p2 a0   p2 b0 b1   -  q0   q1       by which token
    sees       what is before it in its own segment, and all of its prompt; never a sibling, never another group

Of the T x T pairs only those that count are computed, in one of three ways:

    blocks    CPU: every segment by itself (causal), every completion over its prompt (all pairs), both with PyTorch's
              flash kernel, put together by their log-sum-exps; no mask, no padding, no copies of keys
    flex      CUDA: `flex_attention` with a block mask, on rows filled up to whole blocks; compiled for the first length
              and for any other, for each set of inputs that need a gradient
    mask      anywhere: `sdpa` with the `[T, T]` mask written out; for GPUs that flex_attention does not support
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.batching.layout import labels, spans
from learner.batching.packing import cheapest_runs
from learner.model.flex import attend_by_blocks, block_mask_of, flex_length
from vlm.batch import GroupLengths

AttentionBackend = Literal["auto", "blocks", "flex", "mask"]
IMPLEMENTATION = "saccade_groups"
"""The name under which transformers' language models find `_forward`."""
CALL_OVERHEAD = 2**14
"""Cost of one more call of the kernel, in pairs of tokens."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Places:
    """Where N sequences of up to L tokens lie in the row."""

    index: Tensor
    """int64 `[N, L]`."""
    start: int | None
    """The first, where they are one run: what stands there is then taken as it lies, without a copy."""
    filled: Tensor | None
    """bool `[N, L]`: entries that only fill a shorter sequence up; None where there are none."""


@dataclass(frozen=True)
class AttentionBlock:
    """N calls of attention in one: the queries of sequence n over the keys of sequence n."""

    queries: Places
    keys: Places
    causal: bool


Blocks = tuple[list[AttentionBlock], list[AttentionBlock]]
"""Segments over themselves, and completions over their prompts."""


class GroupAttention:
    """Attention over a packed row of `groups`, handed to every layer of the language model."""

    def __init__(
        self, groups: Sequence[GroupLengths], device: torch.device, backend: AttentionBackend = "auto"
    ) -> None:
        self.groups, self.device = groups, device
        self.backend = ("flex" if device.type == "cuda" else "blocks") if backend == "auto" else backend

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query `[1, H, T, D]`, key and value `[1, H', T, D]` -> `[1, T, H, D]`."""
        if self.backend == "flex":
            return attend_by_blocks(query, key, value, self.block_mask, scaling)
        if self.backend == "mask":
            return sdpa_attention_forward(module, query, key, value, self.mask, scaling=scaling)[0]
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return _BlockAttention.apply(*rows, self.blocks, scaling)[None]

    @cached_property
    def mask(self) -> Tensor:
        """bool `[1, 1, T, T]`: True where the query (row) may see the key (column)."""
        segment, group = (x.to(self.device) for x in labels(self.groups))
        return _visible(segment, group, *_grid(len(segment), self.device))[None, None]

    @cached_property
    def block_mask(self) -> BlockMask:
        """Return the mask of the row, filled up to `flex_length` with tokens that see only themselves."""
        length = sum(prompt + sum(own) for prompt, own in self.groups)
        fill = (0, (1,) * (flex_length(length) - length))
        segment, group = (x.to(self.device) for x in labels((*self.groups, fill)))

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _visible(segment, group, query, key)

        return block_mask_of(seen, len(segment), self.device)

    @cached_property
    def blocks(self) -> Blocks:
        """Segments over themselves, and completions over their prompts."""
        own, shared = [], []
        for prompt, completions in spans(self.groups):
            own += [span for span in (prompt, *completions) if span]
            if prompt and any(completions):
                shared.append((range(completions[0].start, completions[-1].stop), prompt))
        alone = _alike([(span, span) for span in own], causal=True)
        by_keys: dict[int, list[tuple[range, range]]] = {}
        for queries, keys in shared:
            by_keys.setdefault(len(keys), []).append((queries, keys))
        over_prompts = [block for pairs in by_keys.values() for block in _alike(pairs, causal=False)]
        return alone, over_prompts


def register() -> None:
    """Tell transformers of this attention; any model may then be given it as its `attn_implementation`."""
    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """A layer's attention: ours, where the row is packed, else as with sdpa."""
    attend: GroupAttention | None = kwargs.pop("group_attention", None)
    if attend is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise RuntimeError(
                f"{type(module).__name__} does not pass on its model's inputs, so packed rows are not supported"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend(module, query, key, value, kwargs["scaling"]), None


def packed_kwargs(groups: Sequence[GroupLengths], device: torch.device, backend: AttentionBackend) -> dict[str, Any]:
    """Return the arguments of the model for a packed row. The mask of one entry only keeps it from making its own."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"attention_mask": mask, "group_attention": GroupAttention(groups, device, backend)}


class _BlockAttention(Function):
    """softmax(s q k') v over the keys that a query sees, which lie in one block or in two.

    Forward: each block alone gives an output o_b and a log-sum-exp l_b of its scores; together they are
    l = log sum exp l_b and o = sum exp(l_b - l) o_b. Backward: with probabilities p = exp(s q k' - l) of the whole and
    dp = do v', the gradient of the scores is p (dp - do . o), block by block: the flash kernel's own backward, given o
    and l of the whole (as in ring attention, arXiv 2310.01889)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
        """q `[T, H, D]`, k and v `[T, H', D]` -> `[T, H, D]`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for block in blocks[0]:
            o, norm = _attend(block, q, k, v, scale)
            _put(out, block.queries, o)
            _put(lse, block.queries, norm)
        for block in blocks[1]:
            o, norm = _attend(block, q, k, v, scale)
            first, former = _take(out, block.queries), _take(lse, block.queries)
            total = torch.logaddexp(former, norm)
            both = first * (former - total).exp()[..., None]
            both.addcmul_(o, (norm - total).exp()[..., None])
            _put(out, block.queries, both.to(out.dtype))
            _put(lse, block.queries, total)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        totals = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for block in (*ctx.blocks[0], *ctx.blocks[1]):
            collect = _put if block.causal else _add  # every token is in one segment
            do, norm = _take(grad, block.queries), _take(lse, block.queries)
            if block.queries.filled is not None:  # of no weight, whatever stands there
                do = do.masked_fill(block.queries.filled[..., None, None], 0.0)
                norm = norm.masked_fill(block.queries.filled[..., None], torch.inf)
            given = (do, *_inputs(block, q, k, v), _take(out, block.queries), norm)
            parts = _flash_backward(*(x.transpose(1, 2) for x in given), 0.0, block.causal, scale=ctx.scale)
            for total, part, places in zip(totals, parts, (block.queries, block.keys, block.keys), strict=True):
                collect(total, places, part.transpose(1, 2))
        return *totals, None, None


def _attend(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[N, L, H, D]` and log-sum-exp `[N, L, H]` of a block alone."""
    given = (x.transpose(1, 2) for x in _inputs(block, q, k, v))
    out, lse = _flash(*given, 0.0, block.causal, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _inputs(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _take(q, block.queries), _take(k, block.keys), _take(v, block.keys)


def _take(x: Tensor, places: Places) -> Tensor:
    """Read `[N, L, ...]` from `[T, ...]`."""
    count = places.index.numel()
    taken = x.index_select(0, places.index.flatten()) if places.start is None else x.narrow(0, places.start, count)
    return taken.unflatten(0, places.index.shape)


def _put(x: Tensor, places: Places, values: Tensor) -> None:
    """Set `[T, ...]` to `[N, L, ...]`."""
    if places.start is not None:
        x.narrow(0, places.start, places.index.numel()).copy_(values.flatten(0, 1))
    elif places.filled is None:
        x[places.index] = values
    else:
        x[places.index[~places.filled]] = values[~places.filled]


def _add(x: Tensor, places: Places, values: Tensor) -> None:
    """Add `[N, L, ...]`, 0 where it only fills up, to `[T, ...]`."""
    if places.start is not None:
        x.narrow(0, places.start, places.index.numel()).add_(values.flatten(0, 1))
    else:
        x.index_add_(0, places.index.flatten(), values.flatten(0, 1).to(x.dtype))


def _alike(pairs: Sequence[tuple[range, range]], *, causal: bool) -> list[AttentionBlock]:
    """Queries and keys of like length in one block each, where filling up costs less than another call. Keys that are
    not the queries themselves have equal lengths."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    queries = np.array([len(pairs[i][0]) for i in order])
    keys = queries if causal else np.array([len(pairs[i][1]) for i in order])

    def cost(end: int) -> np.ndarray:
        return np.arange(end, 0, -1) * queries[:end] * keys[:end] + CALL_OVERHEAD

    blocks = []
    for run in cheapest_runs(len(order), cost):
        members = sorted(order[i] for i in run)  # back in the order of the row, in which they may be one run
        blocks.append(_block([pairs[i] for i in members], causal))
    return blocks


def _block(pairs: Sequence[tuple[range, range]], causal: bool) -> AttentionBlock:
    queries = _lay([own for own, _ in pairs])
    return AttentionBlock(queries, queries if causal else _lay([keys for _, keys in pairs]), causal)


def _lay(spans: Sequence[range]) -> Places:
    """Spans side by side, shorter ones filled up with their first place."""
    starts, lengths = np.array([s.start for s in spans]), np.array([len(s) for s in spans])
    within = np.arange(lengths.max())[None]
    filled = within >= lengths[:, None]
    index = np.where(filled, starts[:, None], starts[:, None] + within)
    run = bool((np.diff(index.ravel()) == 1).all())
    return Places(
        torch.from_numpy(index), int(starts[0]) if run else None, torch.from_numpy(filled) if filled.any() else None
    )


def _grid(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    places = torch.arange(length, device=device)
    return places[:, None], places[None, :]


def _visible(segment: Tensor, group: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether the query at one place sees the key at another."""
    same = (segment[key] == 0) | (segment[key] == segment[query])
    return (group[key] == group[query]) & same & (key <= query)
