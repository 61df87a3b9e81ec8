"""Policy losses and aggregation: numbers worked out by hand, a loop in plain Python, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithm.losses import (
    LOSSES,
    SAPO_TEMPERATURES,
    Sequences,
    cispo,
    gspo,
    ppo_clip,
    sapo,
    token_weights,
)
from learner.config import PpoClip

CLIP = PpoClip(low=0.2, high=0.3)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_each(count: int) -> Sequences:
    return Sequences.of(torch.arange(count))


def test_sequences_by_hand():
    # completions a (tokens 0, 2, 3) and b (tokens 1, 4), labelled 7 and 3
    sequences = Sequences.of(torch.tensor([7, 3, 7, 7, 3]))
    values = doubles(1.0, 10.0, 2.0, 6.0, 30.0)
    assert sequences.total(values).tolist() == [9.0, 40.0, 9.0, 9.0, 40.0]
    assert sequences.mean(values).tolist() == [3.0, 20.0, 3.0, 3.0, 20.0]
    assert sequences.length.tolist() == [3, 2, 3, 3, 2]


def test_ppo_clip_by_hand():
    # ratios 1, 1.5, 1.5, 0.5, 0.5, 1.25 with advantages +2 +2 -2 +2 -2 +2; bounds 0.8 and 1.3
    logprobs, old = doubles(1.0, 1.5, 1.5, 0.5, 0.5, 1.25).log(), torch.zeros(6, dtype=torch.float64)
    advantages = doubles(2.0, 2.0, -2.0, 2.0, -2.0, 2.0)
    token = ppo_clip(logprobs, old, advantages, one_each(6), CLIP)
    #    -1*2  -min(3, 2.6)  -min(-3, -2.6)  -min(1, 1.6)  -min(-1, -1.6)  -2.5
    assert token.loss.tolist() == pytest.approx([-2.0, -2.6, 3.0, -1.0, 1.6, -2.5])
    assert token.clipped.tolist() == [False, True, False, False, True, False]


def test_dual_clip_by_hand():
    # ratios 5 and 2 with advantage -1: losses 5 and 2, of which dual clip 3 lets 3 and 2 pass; +1 is not its business
    logprobs = doubles(5.0, 2.0, 5.0).log().requires_grad_()
    clip = PpoClip(low=0.2, high=10.0, dual=3.0)
    token = ppo_clip(logprobs, torch.zeros(3, dtype=torch.float64), doubles(-1.0, -1.0, 1.0), one_each(3), clip)
    assert token.loss.tolist() == pytest.approx([3.0, 2.0, -5.0])
    assert token.clipped.tolist() == [True, False, False]
    token.loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, 2.0, -5.0])


def test_a_clipped_token_has_no_gradient():
    logprobs = doubles(1.5, 0.5, 1.1).log().requires_grad_()
    token = ppo_clip(logprobs, torch.zeros(3), doubles(1.0, -1.0, 1.0), one_each(3), CLIP)
    token.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, -1.1])


def test_gspo_by_hand():
    # one completion, token ratios 4 and 1: geometric mean 2, clipped at 1.3 for A = 1; the other, ratios 1.2 and 1.2
    logprobs = doubles(4.0, 1.0, 1.2, 1.2).log().requires_grad_()
    old, advantages = torch.zeros(4, dtype=torch.float64), doubles(1.0, 1.0, -2.0, -2.0)
    sequences = Sequences.of(torch.tensor([0, 0, 1, 1]))
    token = gspo(logprobs, old, advantages, sequences, CLIP)
    assert token.ratio.tolist() == pytest.approx([2.0, 2.0, 1.2, 1.2])
    assert token.loss.tolist() == pytest.approx([-1.3, -1.3, 2.4, 2.4])
    assert token.clipped.tolist() == [True, True, False, False]
    # aggregated by sequence, the loss of the second is s * 2 with s = exp((l3 + l4) / 2): d / dl3 = 2 s / 2 = 1.2,
    # over two completions 0.6
    (token_weights(sequences, "sequence", 4, 2, 1) * token.loss).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 0.6, 0.6])


def test_cispo_by_hand():
    # ratios 2 and 0.5, clipped to 1.3 and 0.8 as weights: loss -w A log pi, gradient -w A
    logprobs = doubles(2.0, 0.5).log().requires_grad_()
    token = cispo(logprobs, torch.zeros(2, dtype=torch.float64), doubles(1.0, -3.0), one_each(2), CLIP)
    assert token.loss.tolist() == pytest.approx([-1.3 * math.log(2.0), 0.8 * 3 * math.log(0.5)])
    token.loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-1.3, 2.4])
    assert not token.clipped.any()


def test_sapo_by_hand():
    # ratio 1.5: gate 4 sigmoid(0.5) for A = 1 (tau 1), 4 / 1.05 sigmoid(0.525) for A = -1
    token = sapo(doubles(1.5, 1.5).log(), doubles(0.0, 0.0), doubles(1.0, -1.0), one_each(2), CLIP)
    assert SAPO_TEMPERATURES == (1.0, 1.05)
    positive = 4 / (1 + math.exp(-0.5))
    negative = 4 / 1.05 / (1 + math.exp(-1.05 * 0.5))
    assert token.loss.tolist() == pytest.approx([-positive, negative])


@pytest.mark.parametrize("name", LOSSES)
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(name: str):
    # d/dtheta of -A pi / pi_old at pi = pi_old is -A d log pi / dtheta; of a whole sequence's ratio its mean
    logprobs = (-torch.rand(50, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(10, dtype=torch.float64).repeat_interleave(5)
    sequences = Sequences.of(torch.arange(10).repeat_interleave(5))
    LOSSES[name](logprobs, logprobs.detach(), advantages, sequences, CLIP).loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(name: str):
    random = torch.Generator().manual_seed(3)
    old = -torch.rand(6, generator=random, dtype=torch.float64)
    logprobs = (old + 0.5 * torch.randn(6, generator=random, dtype=torch.float64)).requires_grad_()
    advantages = doubles(1.0, 1.0, 1.0, -2.0, -2.0, -2.0)
    sequences = Sequences.of(torch.tensor([0, 0, 0, 1, 1, 1]))
    # Weights that are detached on purpose are constants of the finite differences too.
    if name == "cispo":
        weight = (logprobs.detach() - old).exp().clamp(0.8, 1.3)
        expected = -weight * advantages
    else:
        expected = torch.stack([_difference(name, logprobs.detach(), i, old, advantages, sequences) for i in range(6)])
    LOSSES[name](logprobs, old, advantages, sequences, CLIP).loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-6, atol=1e-8)


def _difference(name: str, logprobs: torch.Tensor, i: int, *rest: object) -> torch.Tensor:
    step = torch.zeros_like(logprobs)
    step[i] = 1e-6
    high, low = (LOSSES[name](logprobs + s, *rest, CLIP).loss.sum() for s in (step, -step))  # type: ignore[arg-type]
    return (high - low) / 2e-6


def test_aggregations_by_hand():
    # completions of 3 and 1 tokens, in a global batch of 8 tokens in 4 completions, at most 5 tokens each
    sequences = Sequences.of(torch.tensor([0, 0, 0, 1]))
    assert token_weights(sequences, "token", 8, 4, 5).tolist() == pytest.approx([1 / 8] * 4)
    assert token_weights(sequences, "sequence", 8, 4, 5).tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 12, 1 / 4])
    assert token_weights(sequences, "constant", 8, 4, 5).tolist() == pytest.approx([1 / 20] * 4)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_weights_of_a_whole_batch_sum_to_what_they_should(lengths: list[int]):
    labels = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    sequences, tokens = Sequences.of(labels), float(sum(lengths))
    for aggregation, expected in (("token", 1.0), ("sequence", 1.0), ("constant", tokens / (len(lengths) * 6))):
        weights = token_weights(sequences, aggregation, tokens, len(lengths), 6)  # type: ignore[arg-type]
        assert weights.sum().item() == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "completions"), [(0.0, 3.0), (5.0, 0.0)])
def test_an_empty_global_batch_is_refused(tokens: float, completions: float):
    with pytest.raises(ValueError, match="trained tokens in"):
        token_weights(one_each(1), "token", tokens, completions, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_any_ratio_and_zero_where_clipped(name: str, dtype: torch.dtype):
    # log ratios of one token each; A > 0 above the clip and A = 0 have no gradient
    distance = torch.tensor([1e4, 200.0, 89.0, 0.0, -89.0, -1e4], dtype=dtype)
    for advantage in (1.0, 0.0, -1.0):
        logprobs = torch.full((6,), -0.5, dtype=dtype, requires_grad=True)
        token = LOSSES[name](logprobs, -0.5 - distance, torch.full((6,), advantage, dtype=dtype), one_each(6), CLIP)
        token.loss.sum().backward()
        assert token.loss.isfinite().all() and logprobs.grad is not None and logprobs.grad.isfinite().all()
        assert logprobs.grad[3].item() == pytest.approx(-advantage)
        if name in ("ppo_clip", "gspo", "sapo") and advantage > 0:
            assert logprobs.grad[:3].tolist() == [0.0] * 3
        if advantage == 0:
            assert not logprobs.grad.any()
