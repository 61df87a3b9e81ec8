"""Policy losses and the KL estimator: pure functions over token-aligned tensors, `[T]` or `[B, L]` alike.

A loss is a *sum* over masked tokens divided by an explicit global denominator, so that it is the same for any
micro-batch size, packing and number of ranks. Masked-out entries never reach the result or its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClipRange:
    """The ratio is clipped to `[1 - low, 1 + high]`."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Token-wise terms, shaped like the log-probabilities."""

    loss: Tensor
    ratio: Tensor
    """pi / pi_old, detached."""
    clipped: Tensor
    """bool: the clip is active, the token has no policy gradient."""


PolicyLoss = Callable[[Tensor, Tensor, Tensor, ClipRange], TokenLoss]
"""(logprobs, old log-probabilities, advantages, clip) -> TokenLoss; the first alone carries a gradient."""


def clipped_ratio(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: ClipRange) -> TokenLoss:
    """-min(r A, clip(r) A), r = pi / pi_old (PPO, arXiv:1707.06347, equation 7); `clip.high` may exceed `clip.low`
    (clip-higher, DAPO, arXiv:2503.14476, section 3.1)."""
    ratio = torch.exp(logprobs - old_logprobs)
    bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    plain, limited = -ratio * advantages, -bounded * advantages
    return TokenLoss(torch.maximum(plain, limited), ratio.detach(), limited.detach() > plain.detach())


LOSSES: dict[str, PolicyLoss] = {"clipped_ratio": clipped_ratio}


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimates KL(pi || reference) from tokens sampled by pi: exp(d) - d - 1 with d = log reference - log pi.

    Never negative, unbiased in value, low variance (Schulman, "Approximating KL divergence", 2020, estimator k3)."""
    d = reference_logprobs - logprobs
    return torch.exp(d) - d - 1.0


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum where `mask`. Selects instead of multiplying: an infinity outside the mask must not become a NaN."""
    return values[mask].sum()


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What a policy update needs of a micro-batch; every tensor is shaped like `mask`."""

    logprobs: Tensor
    entropy: Tensor
    behavior_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
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
    terms: TokenTerms, policy_loss: PolicyLoss, clip: ClipRange, beta: float, denominator: float
) -> LossTerms:
    """sum over masked tokens of (policy loss + beta * k3), divided by `denominator`, the number of such tokens in the
    whole global batch (token mean: Dr. GRPO, arXiv:2503.20783, and DAPO explain why not per sequence).

    Raises ValueError for beta > 0 without reference log-probabilities."""
    if denominator <= 0:
        raise ValueError(f"the denominator is the number of trained tokens in the global batch, got {denominator}")
    mask = terms.mask
    # Selected first: everything below is over the [T] trained tokens, and the rest has no gradient at all.
    logprobs, old = terms.logprobs[mask], terms.old_logprobs[mask]
    token = policy_loss(logprobs, old, terms.advantages[mask], clip)
    loss = token.loss.sum()
    mismatch = (logprobs.detach() - terms.behavior_logprobs[mask]).abs()
    sums = {
        "policy_loss": token.loss.detach().sum(),
        "entropy": terms.entropy[mask].detach().sum(),
        "clip_fraction": token.clipped.sum(),
        "ratio": token.ratio.sum(),
        "mismatch_mean": mismatch.sum(),
    }
    if beta > 0:
        if terms.reference_logprobs is None:
            raise ValueError(f"beta={beta} needs the reference policy's log-probabilities")
        kl = k3(logprobs, terms.reference_logprobs[mask])
        loss = loss + beta * kl.sum()
        sums["kl"] = kl.detach().sum()
    maxima = {"mismatch_max": _largest(mismatch), "ratio_max": _largest(token.ratio)}
    return LossTerms(loss / denominator, sums, maxima)


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
