"""The loss of a policy update, put together from its parts: policy loss x correction, KL, entropy, aggregation.

L = sum over trained tokens of weight_t (correction_t policy_loss_t + beta kl_t - bonus entropy_t)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from learner.algorithm.divergence import CORRECTIONS, KL_ESTIMATORS, k3
from learner.algorithm.losses import LOSSES, Sequences, ratio_of, token_weights
from learner.config import AlgorithmConfig, Behavior


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


def policy_update_loss(
    terms: TokenTerms, algorithm: AlgorithmConfig, counts: GlobalCounts, *, max_length: int
) -> LossTerms:
    """A micro-batch's part of the loss over the global batch of `counts`. `max_length`: the tokens that a completion
    may have, for aggregation "constant".

    Raises ValueError for counts that are not positive, and for a KL in the loss without reference log-probabilities."""
    mask, off_policy = terms.mask, algorithm.off_policy
    # Selected first: everything below is over the [T] trained tokens, and the rest has no gradient at all.
    logprobs, behavior, advantages = terms.logprobs[mask], terms.behavior_logprobs[mask], terms.advantages[mask]
    entropy = terms.entropy[mask]
    sequences = Sequences.of(terms.completions[mask])
    before = logprobs.detach() if terms.before_logprobs is None else terms.before_logprobs[mask]
    old = behavior if isinstance(off_policy, Behavior) else before

    token = LOSSES[algorithm.loss.name](logprobs, old, advantages, sequences, algorithm.loss)
    correction = CORRECTIONS[off_policy.name](before, behavior, sequences, *off_policy.bounds)
    values = correction * token.loss
    if algorithm.entropy_bonus:  # else the head is spared the entropy's gradient, though it would be zero
        values = values - algorithm.entropy_bonus * entropy
    sums = {
        "policy_loss": token.loss.detach().sum(),
        "entropy": entropy.detach().sum(),
        "clip_fraction": token.clipped.sum(),
        "ratio": token.ratio.sum(),
        "correction": correction.sum(),
        **_mismatch(before, behavior),
    }
    if kl := algorithm.kl_in("loss"):
        if terms.reference_logprobs is None:
            raise ValueError(f"kl.weight={kl.weight} needs the reference policy's log-probabilities")
        estimates = KL_ESTIMATORS[kl.estimator](logprobs, terms.reference_logprobs[mask])
        values = values + kl.weight * estimates
        sums["kl"] = estimates.detach().sum()
    weights = token_weights(sequences, algorithm.aggregation, counts.tokens, counts.completions, max_length)
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
