"""Log-probabilities of chosen tokens and entropies of their distributions, straight from hidden states.

    hidden [T, H] ──(chunks of rows)──▶ logits [rows, V] ──▶ log p(token) [T], entropy [T]

The `[T, V]` logits, the largest tensor of a language model's training step, are never held: one chunk exists at a
time (and beside it its exponential), in the forward pass and again, recomputed, in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rollout.types import BAN

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Logits held at once, unless their rows are given: few enough not to matter, enough for a matrix product at full rate
(of 152k tokens 110 rows on CPUs and 883 on GPUs, which read the weight again for every chunk)."""


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
    return logits if temperature == 1.0 else logits.div_(temperature)


def rows_per_chunk(vocabulary: int, device: str) -> int:
    """Return how many rows of float32 logits fill the CHUNK_BYTES of this type of device."""
    return max(1, CHUNK_BYTES[device] // (4 * vocabulary))


class _ChunkedLogprobs(Function):
    """z scaled logits, p = softmax(z), H entropy: d log p_y / dz = onehot_y - p, dH / dz = -p (log p + H).

    A chunk is one tensor `[rows, V]` that is turned in place from logits into what is needed; with the entropy there
    is a second. Where all rows are one chunk, log p is kept for the backward pass instead of being computed again."""

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
        z: Tensor | None = None
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            z = None  # before the next one is made
            z = scaled_logits(hidden[rows], weight, bias, banned, temperature)
            largest = z.amax(-1, keepdim=True)
            p = z.sub_(largest).exp()
            total = p.sum(-1)
            z.sub_(total.log()[:, None])
            normalizer[rows] = largest[:, 0] + total.log()
            logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -p.mul_(z).sum(-1) / total
            del p
        ctx.save_for_backward(hidden, weight, bias, targets, banned, normalizer, entropy)
        ctx.logp = z if len(hidden) <= chunk_rows and any(ctx.needs_input_grad) else None
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
            logp, ctx.logp = ctx.logp, None
            if logp is None:
                logp = scaled_logits(hidden[rows], weight, bias, banned, ctx.temperature)
                logp.sub_(normalizer[rows, None])
            grad_z = _grad_logits(
                logp,
                targets[rows, None],
                None if grad_logprobs is None else grad_logprobs[rows, None],
                None if grad_entropy is None else (grad_entropy[rows, None], entropy[rows, None]),
            )
            del logp
            if ctx.temperature != 1.0:
                grad_z.div_(ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad_z.sum(0)
            grad_z = grad_z.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_z, weight, out=grad_hidden[rows])
            if grad_weight is not None and grad_weight.dtype == grad_z.dtype:
                grad_weight.addmm_(grad_z.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += grad_z.T @ hidden[rows]
            del grad_z
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _grad_logits(
    logp: Tensor, targets: Tensor, grad_logprobs: Tensor | None, of_entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient of the scaled logits `[rows, V]`; `logp` is spent. `of_entropy`: gradient of the entropy, entropy."""
    if of_entropy is None:
        if grad_logprobs is None:
            return logp.zero_()
        grad = logp.exp_().mul_(-grad_logprobs)
    else:
        p = logp.exp()
        grad = logp.add_(of_entropy[1]).mul_(-of_entropy[0])
        if grad_logprobs is not None:
            grad.sub_(grad_logprobs)
        grad.mul_(p)
    return grad if grad_logprobs is None else grad.scatter_add_(-1, targets, grad_logprobs)


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(log p(targets) [T], entropy [T])`, at least float32, for hidden `[T, H]`, weight `[V, H]`, targets int64 `[T]`.

    Differentiable in hidden, weight and bias. `banned`: int64 ids. `chunk_rows`: None: `rows_per_chunk`. T may be 0:
    the gradients are zeros then."""
    chunk_rows = rows_per_chunk(len(weight), hidden.device.type) if chunk_rows is None else chunk_rows
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}: greedy decoding has no log-probabilities")
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, banned, temperature, chunk_rows)


class LogprobHead(nn.Module):
    """The vocabulary projection, which gives log-probabilities of chosen tokens instead of logits.

    Shares the weight of the model's own head (tied to the embedding or not). It is called once per forward pass, so
    that ZeRO-3 gathers the weight once, and not once per chunk."""

    def __init__(self, head: nn.Linear, *, banned: tuple[int, ...], temperature: float) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.temperature = temperature
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
        )
