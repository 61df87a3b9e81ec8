"""Log-probabilities of chosen tokens and entropies of their distributions, straight from hidden states.

    hidden [T, H] ──(chunks of rows)──▶ logits [rows, V] ──▶ log p(token) [T], entropy [T]

The `[T, V]` logits, the largest tensor of a language model's training step, are never held: one chunk exists at a
time, in the forward pass and again, recomputed, in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BAN = -100.0
"""Added to a banned token's logit: the engine's `logit_bias`, which it clamps to this."""


def scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor | None, temperature: float
) -> Tensor:
    """`[rows, V]`, at least float32: the logits that the engine's softmax sees.

    In the engine's order: projection in the model's precision, then float32, then bans, then temperature; so a ban at
    temperature T lowers the scaled logit by 100 / T."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if banned is not None:
        logits[:, banned] += BAN
    return logits.div_(temperature)


class _ChunkedLogprobs(Function):
    """z scaled logits, p = softmax(z), H entropy: d log p_y / dz = onehot_y - p, dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        banned: Tensor | None,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=kind, device=hidden.device)
        entropy, normalizer = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            z = scaled_logits(hidden[rows], weight, bias, banned, temperature)
            normalizer[rows] = z.logsumexp(-1)
            logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0] - normalizer[rows]
            z -= normalizer[rows, None]
            entropy[rows] = -(z.exp() * z).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, banned, normalizer, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, banned, normalizer, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over chunks in float32 whatever the weight's precision.
        grad_weight = torch.zeros_like(weight, dtype=normalizer.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=normalizer.dtype) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            logp = scaled_logits(hidden[rows], weight, bias, banned, ctx.temperature) - normalizer[rows, None]
            p = logp.exp()
            grad_z = torch.zeros_like(p)
            if grad_logprobs is not None:
                grad_z -= p * grad_logprobs[rows, None]
                grad_z.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
            if grad_entropy is not None:
                grad_z -= p * (logp + entropy[rows, None]) * grad_entropy[rows, None]
            grad_z = grad_z.div_(ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad_z.sum(0)
            grad_logits = grad_z.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`(log p(targets) [T], entropy [T])`, at least float32, for hidden `[T, H]`, weight `[V, H]`, targets int64 `[T]`.

    Differentiable in hidden, weight and bias. `banned`: int64 ids. T may be 0: the gradients are zeros then."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}: greedy decoding has no log-probabilities")
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, banned, temperature, chunk_rows)


class LogprobHead(nn.Module):
    """The vocabulary projection, which gives log-probabilities of chosen tokens instead of logits.

    Shares the weight of the model's own head (tied to the embedding or not). It is called once per forward pass, so
    that ZeRO-3 gathers the weight once, and not once per chunk."""

    def __init__(self, head: nn.Linear, *, banned: tuple[int, ...], temperature: float, chunk_rows: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.temperature = temperature
        self.chunk_rows = chunk_rows
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.int64) if banned else None, persistent=False)
        self.banned: Tensor | None

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden `[T, H]`, targets `[T]` -> log-probabilities and entropies `[T]`."""
        return chunked_logprobs(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            banned=self.banned,
            temperature=self.temperature,
            chunk_rows=self.chunk_rows,
        )
