"""What ZeRO-3 loads holds the buffers of a plain load, in value and dtype: bfloat16 is for parameters alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.model.load import load_base
from tests.helpers.learner_cases import adapter_of, options
from vlm.tiny import TINY, build_tiny

QUICK = ("gemma3", "internvl", "llama", "pixtral", "qwen2_5_vl", "qwen3_vl")
FAMILIES = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in sorted(TINY)]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_those_of_a_plain_load(process_group: None, tmp_path: Path, family: str) -> None:
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    model = build_tiny(family, tmp_path / family)
    adapter, chosen = adapter_of(model), options(model, dtype="bfloat16", zero_stage=3, kl=None)
    expected = dict(load_base(chosen, adapter).named_buffers())
    found = dict(DeepSpeedEngine(chosen, adapter).policy.base.named_buffers())
    assert found.keys() == expected.keys()
    rotary = [name for name in expected if name.endswith("inv_freq")]
    assert rotary and all(expected[name].dtype == torch.float32 for name in rotary)
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name].cpu(), buffer), name
