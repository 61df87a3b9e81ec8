"""How far two policies are apart, from tokens that one of them sampled; and what to do about tokens of another policy.

Pure functions over the T trained tokens of a micro-batch, `[T]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.algorithm.losses import Sequences, ratio_of

KLEstimator = Callable[[Tensor, Tensor], Tensor]
"""(log-probabilities under the sampling policy pi, under the reference) -> token-wise estimates of KL(pi || reference).

All from J. Schulman, "Approximating KL divergence" (2020), but the last."""


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log reference: unbiased, of high variance, negative at times. Its gradient vanishes in expectation, so
    it is of use in the reward and not as a term of the loss."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log reference)^2 / 2: biased in value, while its gradient is in expectation that of the KL."""
    return 0.5 * (logprobs - reference) ** 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log reference - log pi: never negative, unbiased in value, of low variance."""
    d = reference - logprobs
    return ratio_of(d) - d - 1.0


def absolute(logprobs: Tensor, reference: Tensor) -> Tensor:
    """|log pi - log reference|: no estimate of the KL, but a bound on single tokens that grows slowly."""
    return (logprobs - reference).abs()


KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}

Correction = Callable[[Tensor, Tensor, Sequences, float, float], Tensor]
"""(log-probabilities under the learner's policy before the step, under the engine's that sampled, sequences, low, high)
-> weights of the policy loss, without a gradient; 0 rejects a token."""


def none(learner: Tensor, behavior: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """Every token counts as if the learner had sampled it."""
    return torch.ones_like(learner)


def truncated(learner: Tensor, behavior: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """min(w, high), w = pi_learner / pi_engine of the token (truncated importance sampling; Yao et al.,
    "Your efficient RL framework secretly brings you off-policy RL training", 2025)."""
    return ratio_of(learner - behavior).clamp(max=high)


def truncated_sequence(learner: Tensor, behavior: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """min(w, high), w the product of the ratios of a completion's tokens: unbiased but for the truncation, of a
    variance that grows with the length."""
    return ratio_of(sequences.total(learner - behavior)).clamp(max=high)


def masked(learner: Tensor, behavior: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """w within [low, high], 0 outside: a token on which the two disagree so much is not learned from (IcePop, Ring-1T,
    arXiv:2510.18855)."""
    weight = ratio_of(learner - behavior)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def decoupled(learner: Tensor, behavior: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """w, unbounded: with the ratio against the learner's policy before the step, the decoupled objective of AReaL
    (arXiv:2505.24298)."""
    return ratio_of(learner - behavior)


def geometric(learner: Tensor, behavior: Tensor, sequences: Sequences, low: float, high: float) -> Tensor:
    """1, but 0 at all tokens of a completion whose ratios have a geometric mean outside [low, high]: rejection of whole
    completions, whatever their length."""
    mean = ratio_of(sequences.mean(learner - behavior))
    return ((mean >= low) & (mean <= high)).to(learner.dtype)


CORRECTIONS: dict[str, Correction] = {
    "behavior": none,
    "current": none,
    "tis": truncated,
    "tis_sequence": truncated_sequence,
    "icepop": masked,
    "decoupled": decoupled,
    "geometric": geometric,
}
