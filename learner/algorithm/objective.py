"""The loss of a policy update, put together from its parts: policy loss x correction, KL, entropy, aggregation.

L = sum over trained tokens of weight_t (correction_t policy_loss_t + beta kl_t - bonus entropy_t)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from learner.algorithm.divergence import CORRECTIONS, KL_ESTIMATORS, k3
from learner.algorithm.losses import LOSSES, Clip, Sequences, ratio_of, token_weights
from learner.config import Aggregation


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss that is minimised: the names of its parts, and their numbers."""

    loss: str = "ppo_clip"
    """A key of LOSSES."""
    clip: Clip = field(default_factory=lambda: Clip(0.2, 0.2))
    against_behavior: bool = False
    """Whether the ratio's denominator is what the engine sampled with, instead of the learner's policy before the
    step."""
    aggregation: Aggregation = "token"
    max_length: int = 1
    """Tokens that a completion may have, for aggregation "constant"."""
    correction: str = "none"
    """A key of CORRECTIONS, between the learner's policy before the step and the engine's."""
    correction_range: tuple[float, float] = (0.0, float("inf"))
    beta: float = 0.0
    """Weight of the KL to the reference in the loss."""
    kl: str = "k3"
    """A key of KL_ESTIMATORS."""
    entropy_bonus: float = 0.0


@dataclass(frozen=True, slots=True)
class GlobalCounts:
    """Numbers of trained tokens and completions in one optimizer step, over all micro-batches and ranks."""

    tokens: float
    completions: float


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """The values of a micro-batch that a policy update needs. Every tensor has the shape of `mask`."""

    logprobs: Tensor
    entropy: Tensor
    behavior_logprobs: Tensor
    """Under the engine's policy that sampled."""
    advantages: Tensor
    mask: Tensor
    completions: Tensor
    """A label that differs between completions."""
    before_logprobs: Tensor | None = None
    """Under the learner's policy before the first step on this batch; None: this pass is that policy's."""
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A micro-batch's part of the global loss, and what to report of it (detached)."""

    loss: Tensor
    sums: Mapping[str, Tensor]
    """Sums over the masked tokens; divide by the global token count for means."""
    maxima: Mapping[str, Tensor]
    """Maxima over the masked tokens; 0 where there is none."""


def policy_update_loss(terms: TokenTerms, objective: Objective, counts: GlobalCounts) -> LossTerms:
    """A micro-batch's part of the loss over the global batch of `counts`.

    Raises ValueError for counts that are not positive, and for beta > 0 without reference log-probabilities."""
    mask = terms.mask
    # Selected first: everything below is over the [T] trained tokens, and the rest has no gradient at all.
    logprobs, behavior, advantages = terms.logprobs[mask], terms.behavior_logprobs[mask], terms.advantages[mask]
    entropy = terms.entropy[mask]
    sequences = Sequences.of(terms.completions[mask])
    before = logprobs.detach() if terms.before_logprobs is None else terms.before_logprobs[mask]
    old = behavior if objective.against_behavior else before

    token = LOSSES[objective.loss](logprobs, old, advantages, sequences, objective.clip)
    correction = CORRECTIONS[objective.correction](before, behavior, sequences, *objective.correction_range)
    values = correction * token.loss
    if objective.entropy_bonus:  # else the head is spared the entropy's gradient, though it would be zero
        values = values - objective.entropy_bonus * entropy
    sums = {
        "policy_loss": token.loss.detach().sum(),
        "entropy": entropy.detach().sum(),
        "clip_fraction": token.clipped.sum(),
        "ratio": token.ratio.sum(),
        "correction": correction.sum(),
        **_mismatch(before, behavior),
    }
    if objective.beta > 0:
        if terms.reference_logprobs is None:
            raise ValueError(f"beta={objective.beta} needs the reference policy's log-probabilities")
        kl = KL_ESTIMATORS[objective.kl](logprobs, terms.reference_logprobs[mask])
        values = values + objective.beta * kl
        sums["kl"] = kl.detach().sum()
    weights = token_weights(sequences, objective.aggregation, counts.tokens, counts.completions, objective.max_length)
    maxima = {"mismatch_max": _largest((before - behavior).abs()), "ratio_max": _largest(token.ratio)}
    return LossTerms((weights.to(values.dtype) * values).sum(), sums, maxima)


# What `_mismatch` sums up.
MISMATCH = ("mismatch_mean", "mismatch_kl", "importance_weight", "importance_weight_squared")


def _mismatch(before: Tensor, behavior: Tensor) -> dict[str, Tensor]:
    """How far the learner's policy was from the engine's when the step began, whatever is corrected."""
    weight = ratio_of(before - behavior)
    return {
        "mismatch_mean": (before - behavior).abs().sum(),
        "mismatch_kl": k3(behavior, before).sum(),
        "importance_weight": weight.sum(),
        "importance_weight_squared": (weight**2).sum(),
    }


def token_means(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Means over `tokens` from the sums of all micro-batches; of the importance weights the effective sample size as a
    share of the tokens, (sum w)^2 / (n sum w^2) (Kong 1992)."""
    means = {name: total / tokens for name, total in sums.items()}
    squared = means.pop("importance_weight_squared")
    return {**means, "effective_sample_size": means.pop("importance_weight") ** 2 / squared}


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
