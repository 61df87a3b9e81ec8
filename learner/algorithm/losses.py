"""Policy losses: pure functions over the T trained tokens of a micro-batch, `[T]`.

A loss is a *weighted sum* over tokens; the weights come from `token_weights`, which divides by explicit global counts,
so that the loss is the same for any micro-batch size, packing and number of ranks. No completion is ever split between
micro-batches, so that ratios of whole sequences are exact. What is not trained never reaches any function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.config import Aggregation, Cispo, DualClipped, Gspo, PpoClip, Reinforce, Sapo


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which completion each of T tokens belongs to."""

    index: Tensor
    """int64 `[T]`, 0 to S - 1."""
    lengths: Tensor
    """float64 `[S]`: tokens of each."""

    @classmethod
    def of(cls, labels: Tensor) -> Sequences:
        """From any labels `[T]` that differ between completions."""
        _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        return cls(index, counts.to(torch.float64))

    def total(self, values: Tensor) -> Tensor:
        """Sum over each completion, at every token of it: `[T]` -> `[T]`."""
        sums = values.new_zeros(len(self.lengths)).index_add(0, self.index, values)
        return sums[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each completion, at every token of it: `[T]` -> `[T]`."""
        return self.total(values) / self.length.to(values.dtype)

    @property
    def length(self) -> Tensor:
        """`[T]`: tokens of the completion that each token belongs to."""
        return self.lengths[self.index]


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Token-wise terms `[T]`."""

    loss: Tensor
    ratio: Tensor
    """pi / pi_old, of the token or of its sequence, detached."""
    clipped: Tensor
    """bool: the clip is active, the token has no policy gradient."""


LARGEST_LOG_RATIO = 20.0
"""Log ratio up to which a ratio is exact: e^20 = 4.9e8."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), continued beyond LARGEST_LOG_RATIO by its tangent.

    Values and gradients are those of exp up to there, and finite and of the right sign beyond. The gradient of exp
    itself overflows float32 at a log ratio of 88.7, and times the zero of a clipped token it is not a number."""
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp() * (1.0 + (log_ratio - LARGEST_LOG_RATIO).clamp(min=0.0))


PolicyLoss = Callable[[Tensor, Tensor, Tensor, Sequences, Any], TokenLoss]
"""(logprobs, old log-probabilities, advantages, sequences, its section of the configuration) -> TokenLoss; the first
alone carries a gradient."""


def ppo_clip(logprobs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, clip: PpoClip) -> TokenLoss:
    """-min(r A, clip(r) A), r = pi / pi_old (PPO, arXiv:1707.06347, equation 7); `clip.high` may exceed `clip.low`
    (clip-higher, DAPO, arXiv:2503.14476, section 3.1); bounded for A < 0 by `clip.dual` (arXiv:1912.09729).
    """
    return _clipped(ratio_of(logprobs - old), advantages, clip)


def gspo(logprobs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, clip: Gspo) -> TokenLoss:
    """`ppo_clip` with one ratio for a whole completion, the geometric mean of its tokens' (GSPO, arXiv:2507.18071). The
    paper's objective is this under aggregation "sequence"."""
    return _clipped(ratio_of(sequences.mean(logprobs - old)), advantages, clip)


def cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, clip: Cispo) -> TokenLoss:
    """-sg(clip(r)) A log pi: the ratio is clipped as a weight, and no token loses its gradient (CISPO, MiniMax-M1,
    arXiv:2506.13585)."""
    ratio = ratio_of(logprobs - old).detach()
    weight = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    return TokenLoss(-weight * advantages * logprobs, ratio, torch.zeros_like(ratio, dtype=torch.bool))


SAPO_TEMPERATURES = (1.0, 1.05)
"""For positive and for negative advantages: the paper's."""


def sapo(logprobs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, knobs: Sapo) -> TokenLoss:
    """-4 / tau sigmoid(tau (r - 1)) A: a gate that closes softly in place of the clip, sooner for negative advantages
    (SAPO, arXiv:2511.20347). Its gradient at r = 1 is the plain policy gradient."""
    positive, negative = advantages.new_tensor(SAPO_TEMPERATURES)
    tau = torch.where(advantages > 0, positive, negative)
    ratio = ratio_of(logprobs - old)
    gate = 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0))
    return TokenLoss(-gate * advantages, ratio.detach(), torch.zeros_like(ratio, dtype=torch.bool))


def reinforce(logprobs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, knobs: Reinforce) -> TokenLoss:
    """-A log pi (Williams 1992). `old` has no part; the ratio is reported."""
    ratio = ratio_of(logprobs - old).detach()
    return TokenLoss(-advantages * logprobs, ratio, torch.zeros_like(ratio, dtype=torch.bool))


LOSSES: dict[str, PolicyLoss] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}


def _clipped(ratio: Tensor, advantages: Tensor, clip: DualClipped) -> TokenLoss:
    bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    plain, limited = -ratio * advantages, -bounded * advantages
    loss = torch.maximum(plain, limited)
    clipped = limited.detach() > plain.detach()
    if clip.dual is not None:
        most = -clip.dual * advantages
        beyond = (advantages < 0) & (loss.detach() > most)
        loss, clipped = torch.where(beyond, most, loss), clipped | beyond
    return TokenLoss(loss, ratio.detach(), clipped)


def token_weights(
    sequences: Sequences, aggregation: Aggregation, tokens: float, completions: float, max_length: int
) -> Tensor:
    """float64 `[T]`: what each token counts. `tokens`, `completions`: trained ones of the whole global batch.

    token: 1 / tokens (DAPO, arXiv:2503.14476, section 3.3). sequence: the mean over a completion, then over completions
    (GRPO, arXiv:2402.03300, equation 3). constant: 1 / (completions * max_length), which favours neither short nor long
    ones (Dr. GRPO, arXiv:2503.20783, section 3.2). Raises ValueError for counts that are not positive."""
    if tokens <= 0 or completions <= 0:
        raise ValueError(f"the global batch has {tokens:g} trained tokens in {completions:g} completions")
    if aggregation == "token":
        return torch.full_like(sequences.length, 1.0 / tokens)
    if aggregation == "sequence":
        return 1.0 / (sequences.length * completions)
    return torch.full_like(sequences.length, 1.0 / (completions * max_length))
