"""KL estimators and off-policy corrections: numbers worked out by hand, and expectations over a small vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithm.divergence import CORRECTIONS, KL_ESTIMATORS, k1, k2, k3
from learner.algorithm.losses import Sequences

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
EXACT = (P * (P / Q).log()).sum()


def test_estimators_by_hand():
    # log pi = log 0.5, log reference = log 0.25: their difference is log 2
    pi, reference = torch.tensor(0.5).double().log(), torch.tensor(0.25).double().log()
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 + math.log(2) - 1, "abs": math.log(2)}
    assert {name: e(pi, reference).item() for name, e in KL_ESTIMATORS.items()} == pytest.approx(expected)
    assert KL_ESTIMATORS["abs"](reference, pi).item() == pytest.approx(math.log(2))
    assert all(e(pi, pi).item() == 0.0 for e in KL_ESTIMATORS.values())


def test_k1_and_k3_are_the_divergence_in_expectation_and_k2_is_not():
    assert (P * k1(P.log(), Q.log())).sum().item() == pytest.approx(EXACT.item())
    assert (P * k3(P.log(), Q.log())).sum().item() == pytest.approx(EXACT.item())
    assert (P * k2(P.log(), Q.log())).sum().item() == pytest.approx(
        sum(p / 2 * math.log(p / q) ** 2 for p, q in zip(P.tolist(), Q.tolist(), strict=True))
    )
    assert abs((P * k2(P.log(), Q.log())).sum() - EXACT) > 0.001


def expected_gradient(name: str) -> torch.Tensor:
    """Of the estimator as a loss term, in expectation over tokens that pi samples, with respect to pi's logits."""
    logits = P.log().clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (P * KL_ESTIMATORS[name](logprobs, Q.log())).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_gradients_in_the_loss():
    logits = P.log().clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.exp() * (logprobs - Q.log())).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(expected_gradient("k2"), logits.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_all_but_k1_are_never_negative(ours: float, theirs: float):
    for name in ("k2", "k3", "abs"):
        value = KL_ESTIMATORS[name](torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64))
        assert value.item() >= -1e-12


def test_corrections_by_hand():
    # completion a: importance weights 4 and 0.5 (product 2, geometric mean sqrt 2); b: 0.25 (below the range)
    learner = torch.tensor([4.0, 0.5, 0.25], dtype=torch.float64).log()
    behavior = torch.zeros(3, dtype=torch.float64)
    sequences = Sequences.of(torch.tensor([0, 0, 1]))

    def weights(name: str, low: float = 0.5, high: float = 2.5) -> list[float]:
        return CORRECTIONS[name](learner, behavior, sequences, low, high).tolist()

    assert weights("behavior") == weights("current") == [1.0, 1.0, 1.0]
    assert weights("tis") == pytest.approx([2.5, 0.5, 0.25])
    assert weights("tis_sequence") == pytest.approx([2.0, 2.0, 0.25])
    assert weights("tis_sequence", high=1.5) == pytest.approx([1.5, 1.5, 0.25])
    assert weights("icepop") == pytest.approx([0.0, 0.5, 0.0])
    assert weights("decoupled") == pytest.approx([4.0, 0.5, 0.25])
    assert weights("geometric") == [1.0, 1.0, 0.0]
    assert weights("geometric", high=1.4) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_equal_policies_need_no_correction(name: str):
    logprobs = -torch.rand(7, dtype=torch.float64)
    weights = CORRECTIONS[name](logprobs, logprobs, Sequences.of(torch.tensor([0, 0, 0, 1, 1, 2, 2])), 0.5, 2.0)
    assert weights.tolist() == pytest.approx([1.0] * 7)


def test_importance_weights_make_an_expectation_that_of_the_learner():
    """Over all tokens of a small vocabulary: E_engine[w f] = E_learner[f], which truncation makes smaller."""
    values = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    each = Sequences.of(torch.arange(3))
    weighted = (Q * CORRECTIONS["decoupled"](P.log(), Q.log(), each, 0.0, 1.0) * values).sum()
    assert weighted.item() == pytest.approx((P * values).sum().item())
    cut = CORRECTIONS["tis"](P.log(), Q.log(), each, 0.0, 2.0)
    assert cut.tolist() == pytest.approx([2.0, 1.5, 1 / 3])
