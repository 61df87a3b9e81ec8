"""Attention within a packed row: who sees whom, at which position, and the same numbers by blocks as by a mask."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import config as inductor_config

from learner.batching.layout import labels, position_shift, predicting_position
from learner.model.attention import GroupAttention, _forward
from vlm.batch import GroupLengths

GROUPS: tuple[GroupLengths, ...] = ((3, (2, 3)), (2, (1,)), (1, ()))
"""p0 p1 p2 a0 a1 b0 b1 b2 | q0 q1 c0 | r0"""
CPU = torch.device("cpu")

groups_strategy = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=4).map(tuple)), min_size=1, max_size=5
)


def test_labels_by_hand():
    segment, group = labels(GROUPS)
    assert segment.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 0]
    assert group.tolist() == [0] * 8 + [1] * 3 + [2]


def test_positions_of_completions_continue_from_their_prompt():
    starts = torch.tensor([0] * 8 + [8] * 3 + [11])
    positions = torch.arange(12) - starts - position_shift(GROUPS)
    assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 0]


def test_the_first_token_of_every_completion_is_predicted_by_its_prompts_last():
    assert predicting_position(GROUPS).tolist() == [0, 0, 1, 2, 3, 2, 5, 6, 7, 8, 9, 10]


def test_who_sees_whom_by_hand():
    rows = [
        "100000000000",
        "110000000000",
        "111000000000",
        "111100000000",
        "111110000000",
        "111001000000",
        "111001100000",
        "111001110000",
        "000000001000",
        "000000001100",
        "000000001110",
        "000000000001",
    ]
    mask = GroupAttention(GROUPS, CPU).mask
    assert mask.shape == (1, 1, 12, 12)
    assert ["".join(str(int(seen)) for seen in row) for row in mask[0, 0]] == rows


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[1, H, T, D]` each, softmax over the visible keys -> `[1, T, H, D]`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def random_inputs(
    groups: tuple[GroupLengths, ...], heads: int, kv_heads: int, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = sum(p + sum(own) for p, own in groups)
    return [
        torch.randn(1, length, n, 8, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


@settings(max_examples=60, deadline=None)
@given(groups_strategy.map(tuple), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(0, 1000))
def test_blocks_equal_the_mask_in_value_and_gradient(
    groups: tuple[GroupLengths, ...], heads: tuple[int, int], seed: int
):
    inputs = random_inputs(groups, *heads, torch.float64, seed)
    attend = GroupAttention(groups, CPU, "blocks")
    expected = written_out(*inputs, attend.mask, 0.3)
    found = attend(None, *inputs, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11)


def test_blocks_of_alike_and_of_very_different_lengths():
    """Runs that lie one behind the other are not copied; lengths that differ much are not filled up to each other."""
    alike, over_prompts = GroupAttention(((5, (4, 4, 4)),), CPU).blocks
    assert len(alike) == 1 and len(over_prompts) == 1
    assert over_prompts[0].queries.start == 5 and over_prompts[0].keys.start == 0
    far, _ = GroupAttention(((5, (4, 900, 4, 4)),), CPU).blocks
    assert sorted(tuple(block.queries.index.shape) for block in far) == [(1, 900), (4, 5)]
    (even,), _ = GroupAttention(((4, (4, 4)), (4, (4,))), CPU).blocks
    assert even.queries.start == 0 and even.queries.filled is None


def test_completions_without_tokens_are_seen_by_nobody():
    groups = ((3, (2, 0)), (2, (0,)))
    assert predicting_position(groups).tolist() == [0, 0, 1, 2, 3, 4, 5]
    inputs = random_inputs(groups, 2, 1, torch.float64, 0)
    attend = GroupAttention(groups, CPU, "blocks")
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    torch.testing.assert_close(attend(module, *inputs, 0.3), written_out(*inputs, attend.mask, 0.3))


COMPILED = pytest.param(
    "flex",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            torch.backends.cpu.get_cpu_capability() == "DEFAULT",
            reason="torch writes flex_attention for CPUs with vector instructions only (AVX2 or more)",
        ),
    ],
)


@pytest.mark.parametrize("backend", ["mask", COMPILED])
def test_every_backend_gives_the_same_values(backend: str):
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    inputs = [x.detach() for x in random_inputs(((40, (30, 25)), (60, (7,))), 4, 2, torch.float32, 0)]
    attend = GroupAttention(((40, (30, 25)), (60, (7,))), CPU, backend)  # type: ignore[arg-type]
    # What torch keeps from a process with other vector instructions (ATEN_CPU_CAPABILITY) gives wrong values in this.
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        found = attend(module, *inputs, 0.3)
    torch.testing.assert_close(found, written_out(*inputs, attend.mask, 0.3), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_near_as_the_plain_kernel():
    inputs = random_inputs(((50, (30, 30, 11)),), 4, 2, torch.bfloat16, 0)
    exact = written_out(*(x.double() for x in inputs), GroupAttention(((50, (30, 30, 11)),), CPU).mask, 0.3)
    blocks, mask = (
        GroupAttention(((50, (30, 30, 11)),), CPU, backend)(SimpleNamespace(num_key_value_groups=2), *inputs, 0.3)
        for backend in ("blocks", "mask")
    )
    assert blocks.dtype == torch.bfloat16
    assert (blocks - exact).abs().max() < 2 * (mask - exact).abs().max()


def test_a_model_that_does_not_hand_its_arguments_on_is_found_out():
    q, k, v = random_inputs(GROUPS, 2, 2, torch.float32, 0)
    with pytest.raises(RuntimeError, match="packed rows are not supported"):
        _forward(SimpleNamespace(), q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), scaling=1.0)
