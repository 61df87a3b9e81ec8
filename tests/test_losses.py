"""Policy loss, KL estimator and denominators: numbers worked out by hand, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.losses import (
    LOSSES,
    ClipRange,
    TokenTerms,
    clipped_ratio,
    k3,
    masked_sum,
    policy_update_loss,
)

CLIP = ClipRange(low=0.2, high=0.3)


def terms(seed: int = 0, shape: tuple[int, ...] = (3, 5), **given_terms: torch.Tensor) -> TokenTerms:
    random = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    values = {
        "logprobs": -draw().abs(),
        "entropy": draw().abs(),
        "behavior_logprobs": -draw().abs(),
        "old_logprobs": -draw().abs(),
        "advantages": draw(),
        "mask": torch.rand(shape, generator=random) < 0.6,
        "reference_logprobs": -draw().abs(),
    }
    return TokenTerms(**{**values, **given_terms})


def test_clipped_ratio_by_hand():
    # ratios 1, 1.5, 1.5, 0.5, 0.5, 1.25 with advantages +2 +2 -2 +2 -2 +2; bounds 0.8 and 1.3
    old = torch.zeros(6, dtype=torch.float64)
    logprobs = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.25], dtype=torch.float64).log()
    advantages = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0, 2.0], dtype=torch.float64)
    token = clipped_ratio(logprobs, old, advantages, CLIP)
    #    -1*2  -min(3, 2.6)  -min(-3, -2.6)  -min(1, 1.6)  -min(-1, -1.6)  -2.5
    assert token.loss.tolist() == pytest.approx([-2.0, -2.6, 3.0, -1.0, 1.6, -2.5])
    assert token.clipped.tolist() == [False, True, False, False, True, False]


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([1.5, 0.5, 1.1], dtype=torch.float64).log().requires_grad_()
    token = clipped_ratio(logprobs, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), CLIP)
    token.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, -1.1])


@pytest.mark.parametrize("name", LOSSES)
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(name: str):
    # d/dtheta of -A pi / pi_old at pi = pi_old is -A d log pi / dtheta
    logprobs = (-torch.rand(50, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(50, dtype=torch.float64)
    LOSSES[name](logprobs, logprobs.detach(), advantages, CLIP).loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages, rtol=1e-12, atol=0)


def test_k3_by_hand():
    # log pi = log 0.5, reference = log 0.25: d = -log 2, k3 = 0.5 + log 2 - 1
    value = k3(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    assert value.item() == pytest.approx(0.5 + math.log(2) - 1)
    assert k3(torch.tensor(-1.0), torch.tensor(-1.0)).item() == 0.0


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(ours: float, theirs: float):
    assert k3(torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)).item() >= -1e-12


def test_k3_estimates_the_divergence():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


def test_update_loss_against_a_loop():
    t, beta, denominator = terms(), 0.3, 17.0
    expected = kl = entropy = mismatch = clipped = ratio_sum = 0.0
    worst = ratio_most = 0.0
    for index in t.mask.nonzero().tolist():
        at = tuple(index)
        new, old, a = (x[at].item() for x in (t.logprobs, t.old_logprobs, t.advantages))
        reference, behavior = t.reference_logprobs[at].item(), t.behavior_logprobs[at].item()
        ratio = math.exp(new - old)
        limited = min(max(ratio, 0.8), 1.3)
        token_kl = math.exp(reference - new) - (reference - new) - 1
        expected += -min(ratio * a, limited * a) + beta * token_kl
        kl += token_kl
        entropy += t.entropy[at].item()
        mismatch += abs(new - behavior)
        worst, ratio_most = max(worst, abs(new - behavior)), max(ratio_most, ratio)
        clipped += limited * a < ratio * a
        ratio_sum += ratio
    result = policy_update_loss(t, clipped_ratio, CLIP, beta, denominator)
    assert result.loss.item() == pytest.approx(expected / denominator, rel=1e-12)
    sums = {name: value.item() for name, value in result.sums.items()}
    assert sums["kl"] == pytest.approx(kl)
    assert sums["entropy"] == pytest.approx(entropy)
    assert sums["mismatch_mean"] == pytest.approx(mismatch)
    assert sums["clip_fraction"] == clipped > 0
    assert sums["ratio"] == pytest.approx(ratio_sum)
    assert result.maxima["mismatch_max"].item() == pytest.approx(worst)
    assert result.maxima["ratio_max"].item() == pytest.approx(ratio_most)


@given(st.integers(1, 11), st.integers(0, 5))
def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(cut: int, seed: int):
    def run(pieces: list[slice]) -> tuple[float, torch.Tensor]:
        t = terms(seed, (12, 4))
        logprobs = t.logprobs.clone().requires_grad_()
        denominator, total = float(t.mask.sum()), 0.0
        for piece in pieces:
            values = {name: getattr(t, name)[piece] for name in TokenTerms.__slots__}
            part = policy_update_loss(
                TokenTerms(**{**values, "logprobs": logprobs[piece]}), clipped_ratio, CLIP, 0.1, denominator
            )
            part.loss.backward()
            total += part.loss.item()
        assert logprobs.grad is not None
        return total, logprobs.grad

    whole, gradient = run([slice(0, 12)])
    parts, summed = run([slice(0, cut), slice(cut, 12)])
    assert parts == pytest.approx(whole, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(summed, gradient, rtol=1e-12, atol=1e-14)


def test_masked_tokens_have_exactly_no_gradient_whatever_stands_there():
    t = terms()
    hole = ~t.mask
    poisoned = t.logprobs.masked_fill(hole, float("-inf")).requires_grad_()
    advantages = t.advantages.masked_fill(hole, float("nan"))
    policy_update_loss(terms(logprobs=poisoned, advantages=advantages), clipped_ratio, CLIP, 0.1, 5.0).loss.backward()
    assert poisoned.grad is not None
    assert (poisoned.grad[hole] == 0).all() and torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad[t.mask] != 0).any()


def test_a_micro_batch_without_tokens_has_loss_zero_and_a_graph():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    result = policy_update_loss(terms(shape=(2, 3), logprobs=logprobs, mask=none), clipped_ratio, CLIP, 0.1, 5.0)
    result.loss.backward()
    assert result.loss.item() == 0.0 and logprobs.grad is not None and (logprobs.grad == 0).all()
    assert all(value.item() == 0.0 for value in [*result.sums.values(), *result.maxima.values()])


def test_masked_sum_selects():
    assert masked_sum(torch.tensor([1.0, float("inf"), 2.0]), torch.tensor([True, False, True])).item() == 3.0


def test_beta_without_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"beta=0.1 needs the reference"):
        policy_update_loss(terms(reference_logprobs=None), clipped_ratio, CLIP, 0.1, 5.0)  # type: ignore[arg-type]


def test_an_empty_global_batch_is_refused():
    with pytest.raises(ValueError, match="denominator"):
        policy_update_loss(terms(), clipped_ratio, CLIP, 0.0, 0.0)
