"""Towers by windows in one call: the same features and gradients as window by window. The kernel needs a GPU; here its
definition stands in for it, called as the installed torch declares it."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from learner.batching.collate import collate
from learner.batching.rows import TrainingRow, encode_prompts, to_sample
from learner.model import windows
from learner.model.load import load_policy
from tests.helpers.learner_cases import ROUNDED, adapter_of, make_group, options
from vlm.batch import MultimodalBatch
from vlm.tiny import build_tiny


class Kernel:
    """softmax(s q k') v within each window, by the arguments of `varlen_attn`."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = signature(varlen_attn).bind(*args, **kwargs).arguments
        self.calls += 1
        ends = given["cu_seq_q"]
        assert ends.dtype == torch.int32 and torch.equal(ends, given["cu_seq_k"])
        assert given["max_q"] == given["max_k"] == int(ends.diff().max())
        q, k, v = (given[name] for name in ("query", "key", "value"))
        assert all(x.is_contiguous() and x.shape == q.shape for x in (q, k, v)) and len(q) == int(ends[-1])
        spans = [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        return torch.cat([_attend(q[s], k[s], v[s], given["scale"]) for s in spans])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1), v)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen2_5_omni"])
def test_features_and_gradients_are_those_of_one_call_for_each_window(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(family, tmp_path / family)
    adapter = adapter_of(model)
    policy = load_policy(options(model, media_kinds=tuple({*adapter.modalities} - {"video"})), adapter).double()
    policy._dtype = torch.float64
    batch = batch_of(model)

    def computed() -> tuple[Tensor, dict[str, Tensor]]:
        policy.zero_grad()
        logprobs = policy(batch)[0]
        logprobs.sum().backward()
        return logprobs.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    expected, exact = computed()
    kernel = Kernel()
    monkeypatch.setattr(windows, "varlen_attn", kernel)
    layers = windows.attend_windows_at_once(policy.base)
    found, gradients = computed()
    assert kernel.calls == layers > 0  # one call a layer, of towers for images and for sound
    torch.testing.assert_close(found, expected, rtol=ROUNDED, atol=ROUNDED)
    scale = max(float(g.abs().max()) for g in exact.values())
    for name, gradient in exact.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=ROUNDED * scale, msg=name)


def batch_of(model: Path) -> MultimodalBatch:
    """A row of three groups with images of three sizes."""
    adapter = adapter_of(model)
    groups = [make_group(adapter, i, images=i) for i in (1, 2, 3)]
    prompts = encode_prompts(adapter, groups, {m.digest: m.data for g in groups for m in g.prompt.media})
    samples = [tuple(to_sample(c) for c in g.completions) for g in groups]
    rows = [TrainingRow(p, own) for p, own in zip(prompts, samples, strict=True)]
    return collate(rows, adapter).to("cpu", torch.float64)


def test_models_without_windows_are_left_as_they_are(tmp_path: Path) -> None:
    model = build_tiny("llava_next", tmp_path / "model")
    policy = load_policy(options(model), adapter_of(model))
    assert windows.attend_windows_at_once(policy.base) == 0
    assert policy.base.config.vision_config._attn_implementation == "sdpa"
