"""The loss of an update against a loop in plain Python, and what must not change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithm.objective import GlobalCounts, LossTerms, TokenTerms, policy_update_loss, token_means
from learner.config import (
    AlgorithmConfig,
    Behavior,
    Cispo,
    Current,
    Decoupled,
    Geometric,
    Gspo,
    Icepop,
    Kl,
    PpoClip,
    Reinforce,
    Sapo,
    Tis,
    TisSequence,
)

CLIP = PpoClip(low=0.2, high=0.3)
CURRENT = AlgorithmConfig(loss=CLIP, off_policy=Current())


def terms(seed: int = 0, shape: tuple[int, int] = (3, 5), **given_terms: torch.Tensor | None) -> TokenTerms:
    """A completion a row; log-probabilities of several policies that are not far apart."""
    random = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    logprobs = -draw().abs() - 0.1
    values: dict[str, torch.Tensor | None] = {
        "logprobs": logprobs,
        "entropy": draw().abs(),
        "behavior_logprobs": logprobs + 0.3 * draw(),
        "before_logprobs": logprobs + 0.2 * draw(),
        "advantages": draw()[:, :1].expand(shape),
        "mask": torch.rand(shape, generator=random) < 0.6,
        "completions": torch.arange(shape[0])[:, None].expand(shape),
        "reference_logprobs": logprobs + 0.5 * draw(),
    }
    return TokenTerms(**{**values, **given_terms})  # type: ignore[arg-type]


def counts(t: TokenTerms) -> GlobalCounts:
    return GlobalCounts(float(t.mask.sum()), float(t.mask.any(1).sum()))


def loss_of(t: TokenTerms, algorithm: AlgorithmConfig, total: GlobalCounts) -> LossTerms:
    return policy_update_loss(t, algorithm, total, max_length=5)


def in_a_loop(t: TokenTerms, algorithm: AlgorithmConfig, total: GlobalCounts) -> dict[str, float]:
    """The formulas written out, token by token, for ppo_clip, tis, k3 and aggregation by completion."""
    assert t.before_logprobs is not None and t.reference_logprobs is not None and algorithm.kl is not None
    result = dict.fromkeys(("loss", "kl", "mismatch", "clipped", "weight", "squared", "worst"), 0.0)
    for row in range(t.mask.shape[0]):
        where = t.mask[row].nonzero()[:, 0].tolist()
        for at in where:
            new, before = t.logprobs[row, at].item(), t.before_logprobs[row, at].item()
            behavior, reference = t.behavior_logprobs[row, at].item(), t.reference_logprobs[row, at].item()
            a = t.advantages[row, at].item()
            ratio = math.exp(new - before)
            limited = min(max(ratio, 0.8), 1.3)
            weight = math.exp(before - behavior)
            kl = math.exp(reference - new) - (reference - new) - 1
            value = -min(weight, 1.1) * min(ratio * a, limited * a) + algorithm.kl.weight * kl
            value -= algorithm.entropy_bonus * t.entropy[row, at].item()
            result["loss"] += value / (len(where) * total.completions)
            result["kl"] += kl
            result["mismatch"] += abs(before - behavior)
            result["worst"] = max(result["worst"], abs(before - behavior))
            result["clipped"] += limited * a < ratio * a
            result["weight"] += weight
            result["squared"] += weight**2
    return result


def test_the_loss_against_a_loop():
    t = terms()
    algorithm = AlgorithmConfig(
        loss=CLIP, aggregation="sequence", off_policy=Tis(max=1.1), kl=Kl(0.3), entropy_bonus=0.01
    )
    total = GlobalCounts(17.0, 4.0)  # this is a micro-batch of a larger batch
    expected = in_a_loop(t, algorithm, total)
    result = loss_of(t, algorithm, total)
    assert result.loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    sums = {name: value.item() for name, value in result.sums.items()}
    assert sums["kl"] == pytest.approx(expected["kl"])
    assert sums["mismatch_mean"] == pytest.approx(expected["mismatch"])
    assert result.maxima["mismatch_max"].item() == pytest.approx(expected["worst"])
    assert sums["clip_fraction"] == expected["clipped"]
    tokens = float(t.mask.sum())
    means = token_means(sums, tokens)
    assert means["effective_sample_size"] == pytest.approx(expected["weight"] ** 2 / (tokens * expected["squared"]))
    assert 0 < means["effective_sample_size"] < 1 and means["mismatch_kl"] > 0


def test_against_the_engines_policy_or_the_learners_before_the_step():
    t = terms()
    behavior = loss_of(t, replace(CURRENT, off_policy=Behavior()), counts(t))
    same = loss_of(replace(t, before_logprobs=t.behavior_logprobs), CURRENT, counts(t))
    assert behavior.loss.item() == same.loss.item()
    first = loss_of(replace(t, before_logprobs=None), CURRENT, counts(t))
    assert first.sums["ratio"].item() == pytest.approx(t.mask.sum().item())  # nothing has changed since


GSPO, INFINITE = Gspo(low=0.2, high=0.3), float("inf")
WIDE = Geometric(min=0.0, max=INFINITE)
CORRECTED = (Tis(max=INFINITE), TisSequence(max=INFINITE), Icepop(min=0.0, max=INFINITE), Decoupled(), WIDE)
ALL = [
    AlgorithmConfig(loss=loss, aggregation=aggregation, off_policy=off_policy, kl=Kl(0.1, kl))  # type: ignore[arg-type]
    for loss, aggregation, off_policy, kl in [
        *((loss, "token", Current(), "k3") for loss in (CLIP, GSPO, Cispo(low=0.2, high=0.3), Sapo(), Reinforce())),
        *((CLIP, aggregation, Current(), "k2") for aggregation in ("sequence", "constant")),
        *((CLIP, "sequence", off_policy, "abs") for off_policy in (Current(), *CORRECTED)),
        (GSPO, "sequence", WIDE, "k3"),
    ]
]


def name_of(algorithm: AlgorithmConfig) -> str:
    assert algorithm.kl is not None
    return f"{algorithm.loss.name}-{algorithm.aggregation}-{algorithm.off_policy.name}-{algorithm.kl.estimator}"


def run(pieces: Sequence[torch.Tensor], seed: int, algorithm: AlgorithmConfig) -> tuple[float, torch.Tensor]:
    """Loss and gradient with rows dealt out to micro-batches."""
    t = terms(seed, (8, 4))
    logprobs = t.logprobs.clone().requires_grad_()
    total, summed = counts(t), 0.0
    for piece in pieces:
        values = {f.name: getattr(t, f.name)[piece] for f in fields(TokenTerms)}
        part = loss_of(TokenTerms(**{**values, "logprobs": logprobs[piece]}), algorithm, total)
        part.loss.backward()
        summed += part.loss.item()
    assert logprobs.grad is not None
    return summed, logprobs.grad


@pytest.mark.parametrize("algorithm", ALL, ids=name_of)
@given(order=st.permutations(range(8)), cut=st.integers(1, 7), seed=st.integers(0, 3))
def test_neither_micro_batches_nor_their_order_change_loss_or_gradient(
    algorithm: AlgorithmConfig, order: list[int], cut: int, seed: int
):
    whole, gradient = run([torch.arange(8)], seed, algorithm)
    parts, summed = run([torch.tensor(order[:cut]), torch.tensor(order[cut:])], seed, algorithm)
    assert parts == pytest.approx(whole, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(summed, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", ALL, ids=name_of)
def test_masked_tokens_have_exactly_no_gradient_whatever_stands_there(algorithm: AlgorithmConfig):
    t = terms()
    hole = ~t.mask
    poisoned = t.logprobs.masked_fill(hole, float("-inf")).requires_grad_()
    poison = terms(logprobs=poisoned, advantages=t.advantages.masked_fill(hole, float("nan")))
    loss_of(poison, algorithm, counts(t)).loss.backward()
    assert poisoned.grad is not None
    assert (poisoned.grad[hole] == 0).all() and torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad[t.mask] != 0).any()


def test_a_micro_batch_without_tokens_has_loss_zero_and_a_graph():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    none = terms(shape=(2, 3), logprobs=logprobs, mask=torch.zeros(2, 3, dtype=torch.bool))
    for algorithm in ALL:
        logprobs.grad = None
        result = loss_of(none, algorithm, GlobalCounts(5.0, 2.0))
        result.loss.backward()
        assert result.loss.item() == 0.0 and logprobs.grad is not None and (logprobs.grad == 0).all()
        assert all(value.item() == 0.0 for value in [*result.sums.values(), *result.maxima.values()])


def test_the_entropy_bonus_pushes_towards_entropy():
    entropy = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    t = terms(entropy=entropy)
    loss_of(t, replace(CURRENT, entropy_bonus=0.5), counts(t)).loss.backward()
    assert entropy.grad is not None
    assert entropy.grad[t.mask].tolist() == pytest.approx([-0.5 / t.mask.sum().item()] * int(t.mask.sum()))
    assert (entropy.grad[~t.mask] == 0).all()


def test_a_kl_without_a_reference_is_refused():
    t = terms(reference_logprobs=None)
    with pytest.raises(ValueError, match=r"kl.weight=0.1 needs the reference"):
        loss_of(t, replace(CURRENT, kl=Kl(0.1)), counts(t))
