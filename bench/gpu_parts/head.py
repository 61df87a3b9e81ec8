"""The vocabulary projection in chunks at V = 151,936: compare error, time and memory with complete logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu_parts.common import Setting, error_of
from bench.learner_work import chosen_logprobs
from learner.model.logprobs import CHUNK_BYTES, chunked_logprobs

SAMPLE = 256
"""How many rows have exact values in float64."""


def run(setting: Setting) -> dict[str, Any]:
    rows, hidden, vocabulary = (512, 64, 4096) if setting.small else (16_384, 2048, 151_936)
    torch.manual_seed(0)
    device = setting.device
    states = torch.randn(rows, hidden, device=device, dtype=setting.dtype)
    weight = torch.randn(vocabulary, hidden, device=device, dtype=setting.dtype) * hidden**-0.5
    targets = torch.randint(vocabulary, (rows,), device=device)
    wanted = torch.randn(rows, device=device)
    sample = slice(0, min(SAMPLE, rows))
    exact = _exact(states[sample], weight, targets[sample], wanted[sample])
    ours = _ours(states[sample], weight, targets[sample], wanted[sample])
    naive = _naive(states[sample], weight, targets[sample], wanted[sample])
    errors = {
        name: {kind: error_of(found[kind], exact[kind]) for kind in exact}
        for name, found in (("chunked", ours), ("whole", naive))
    }

    def chunked() -> None:
        _ours(states, weight, targets, wanted)

    def whole() -> None:
        _naive(states, weight, targets, wanted)

    found: dict[str, Any] = {
        "rows": rows,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "errors": errors,
        "chunked": {"seconds": setting.seconds(chunked, 3), "peak_bytes": setting.peak_bytes(chunked)},
    }
    try:
        found["whole"] = {"seconds": setting.seconds(whole, 3), "peak_bytes": setting.peak_bytes(whole)}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        found["whole"] = {"reason": "out of memory"}
    checks = {f"{kind} within twice the error of logits held whole": _near(errors, kind) for kind in exact}
    if setting.cuda:
        # The logits of a chunk, their exponential and product, the gradient of the weight in float32 and of one chunk.
        bound = 3 * CHUNK_BYTES["cuda"] + 6 * weight.numel() + 8 * states.numel() + 2**28
        checks["peak within what is predicted"] = found["chunked"]["peak_bytes"] <= bound
        found["predicted_bytes"] = bound
    found["flops"] = 6 * rows * hidden * vocabulary / found["chunked"]["seconds"]
    found["matmul_flops"] = setting.matmul_flops()
    return {**found, "checks": checks}


def _ours(states: Tensor, weight: Tensor, targets: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs, _ = chunked_logprobs(states, weight, targets)
    return _with_gradients(logprobs, states, weight, wanted)


def _naive(states: Tensor, weight: Tensor, targets: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    return _with_gradients(chosen_logprobs(states @ weight.T, targets), states, weight, wanted)


def _exact(states: Tensor, weight: Tensor, targets: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    states, weight = states.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = torch.log_softmax(states @ weight.T, -1).gather(-1, targets[:, None])[:, 0]
    return _with_gradients(logprobs, states, weight, wanted.double())


def _with_gradients(logprobs: Tensor, states: Tensor, weight: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad((logprobs * wanted).sum(), (states, weight))
    return {"logprobs": logprobs.detach(), "hidden gradient": grads[0], "weight gradient": grads[1]}


def _near(errors: dict[str, dict[str, float]], kind: str) -> bool:
    return errors["chunked"][kind] <= max(2 * errors["whole"][kind], 1e-5)
