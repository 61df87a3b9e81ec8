"""Packed attention on the device: compare flex_attention and the dense mask with float64, in values and gradients.

Heads, key heads and widths are those of Qwen2.5-VL 3B and 7B and of Qwen2.5 0.5B. The error in bfloat16 may be twice
that of `sdpa` with an explicit mask in the same precision. On a CPU, flex_attention has no backward pass, so only
values are compared, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_parts.common import Setting, error_of
from learner.model.attention import GroupAttention
from vlm.batch import GroupLengths

HEADS = ((16, 2, 128), (28, 4, 128), (14, 2, 64))
LENGTHS = (700, 2000, 2048, 9000, 16_384)
COMPARED = 2048
"""Longest row for which exact values are computed: all pairs of all heads, in float64."""
MAX_GRAPHS = 6
"""The most variants of the kernel that all shapes of a run may need, per (heads, key heads, width)."""


def run(setting: Setting) -> dict[str, Any]:
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    lengths = (300, 700) if setting.small else LENGTHS
    heads = HEADS[2:] if setting.small else HEADS
    cases: list[dict[str, Any]] = []
    graphs: dict[str, int] = {}
    for number, key_heads, width in heads:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for length in lengths:
            cases.append(_case(setting, length, number, key_heads, width))
        graphs[f"{number}x{key_heads}x{width}"] = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    compared = [case for case in cases if "errors" in case]
    return {
        "cases": cases,
        "graphs": graphs,
        "checks": {
            "values as near float64 as twice the error of sdpa": all(_near(c, "output") for c in compared),
            "gradients as near float64 as twice the error of sdpa": all(
                _near(c, name) for c in compared for name in ("query", "key", "value") if name in c["errors"]["flex"]
            ),
            f"at most {MAX_GRAPHS} graphs for one kind of heads": all(n <= MAX_GRAPHS for n in graphs.values()),
        },
    }


def groups_of(length: int) -> list[GroupLengths]:
    """Return groups of a prompt and eight completions of different lengths that fill a row of `length` tokens."""
    groups: list[GroupLengths] = []
    left = length
    for prompt in itertools.cycle((300, 1100, 40)):
        completions = tuple(min(max(1, prompt // 4 + 17 * k), 512) for k in range(8))
        if prompt + sum(completions) > left:
            groups.append((left, ()))
            return groups
        groups.append((prompt, completions))
        left -= prompt + sum(completions)
    return groups


def _case(setting: Setting, length: int, heads: int, key_heads: int, width: int) -> dict[str, Any]:
    """Measure seconds, peak memory and, for short rows, errors of `flex` and `mask`."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    made = [torch.randn(1, n, length, width, device=device) for n in (heads, key_heads, key_heads)]
    inputs = [x.to(setting.dtype) for x in made]
    groups, wanted = groups_of(length), torch.randn(1, length, heads, width, device=device)
    found: dict[str, Any] = {"tokens": length, "heads": heads, "key_heads": key_heads, "width": width}
    ours = {name: GroupAttention(groups, device, name) for name in ("flex", "mask")}
    if length <= COMPARED:
        exact = _outputs(ours["mask"], [x.double() for x in inputs], wanted.double(), gradient=setting.cuda)
        found["errors"] = {
            name: {
                kind: error_of(value, exact[kind])
                for kind, value in _outputs(attend, inputs, wanted.to(setting.dtype), gradient=setting.cuda).items()
            }
            for name, attend in ours.items()
        }
        del exact
    for name, attend in ours.items():
        found[name] = _cost(setting, attend, inputs, wanted)
    if setting.cuda:
        found["varlen"] = _varlen(setting, groups, inputs, wanted)
    return found


def _outputs(attend: GroupAttention, inputs: list[Tensor], wanted: Tensor, *, gradient: bool) -> Mapping[str, Tensor]:
    query, key, value = (x.clone().requires_grad_(gradient) for x in inputs)
    with torch.set_grad_enabled(gradient):
        output = attend(_layer(query, key), query, key, value, query.shape[-1] ** -0.5)
    if not gradient:
        return {"output": output}
    grads = torch.autograd.grad((output * wanted).sum(), (query, key, value))
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), grads, strict=True))}


def _layer(query: Tensor, key: Tensor) -> Any:
    """The attributes of an attention layer that transformers' functions read."""
    return SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=True, is_causal=True)


def _cost(setting: Setting, attend: GroupAttention, inputs: list[Tensor], wanted: Tensor) -> dict[str, Any]:
    """Measure forward without gradients and, on a GPU, forward and backward. The result says if a dense mask does not
    fit."""
    given = wanted.to(setting.dtype)

    def once(gradient: bool) -> None:
        _outputs(attend, inputs, given, gradient=gradient)

    try:
        found: dict[str, Any] = {"forward_seconds": setting.seconds(lambda: once(False))}
        if setting.cuda:
            found["seconds"] = setting.seconds(lambda: once(True))
            found["peak_bytes"] = setting.peak_bytes(lambda: once(True))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"reason": "out of memory"}
    return found


def _varlen(setting: Setting, groups: list[GroupLengths], inputs: list[Tensor], wanted: Tensor) -> dict[str, Any]:
    """Measure each segment over itself in one call of the flash kernel. This is less than packed attention computes,
    since no completion sees its prompt, and so a lower bound for a kernel without masks."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {"reason": "this torch has no varlen_attn"}
    newer = "window_size" in signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if newer else {"is_causal": True}
    lengths = [n for prompt, completions in groups for n in (prompt, *completions) if n]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=setting.device)
    repeated = [x[0].repeat_interleave(inputs[0].shape[1] // x.shape[1], 0).transpose(0, 1) for x in inputs]

    def once() -> None:
        own = [x.detach().contiguous().requires_grad_() for x in repeated]
        output: Any = varlen_attn(own[0], own[1], own[2], ends, ends, max(lengths), max(lengths), **causal)
        torch.autograd.grad((output * wanted[0].to(setting.dtype)).sum(), own)

    try:
        return {"seconds": setting.seconds(once), "peak_bytes": setting.peak_bytes(once)}
    except (TypeError, RuntimeError) as error:
        return {"reason": f"{type(error).__name__}: {error}"[:200]}


def _near(case: Mapping[str, Any], kind: str) -> bool:
    """Return whether the error is small enough. In float32 on a CPU both errors are rounding errors and a factor means
    nothing, so 1e-5 is enough."""
    flex, mask = (case["errors"][name][kind] for name in ("flex", "mask"))
    return flex <= max(2 * mask, 1e-5)
