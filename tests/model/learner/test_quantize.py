"""QLoRA: adapters are trained over weights in 4 bits, and the engine gets what the learner computes with."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from learner.engines.checkpoint import load_checkpoint, save_checkpoint
from learner.engines.torch_engine import TorchEngine
from learner.model.load import load_base, load_policy
from learner.model.quantize import quantize_linear_layers
from tests.helpers import learner_cases
from tests.helpers.learner_cases import adapter_of, mixed_case, options
from tests.model.vlm.test_roles import FAMILIES, batch_of, model_of, options_of
from vlm.config import Lora
from weight_sync.source import PolicySource

pytestmark = [
    pytest.mark.usefixtures("logits_in_several_chunks"),
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (the extra qlora) is not installed"
    ),
]
QLORA: dict[str, Any] = {"lora": Lora(4, targets=("language.attention", "vision"), quantize="nf4")}


def update(engine: Any, members: range | list[int] = range(4)) -> dict[str, Any]:
    return learner_cases.update(engine, engine.options, mixed_case(engine.adapter).part(members))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """NF4 by its definition: the nearest of sixteen levels, times the largest magnitude in each block of 64."""
    levels = torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ]
    )
    flat = weight.float().flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 64)]).view(-1, 64)
    scale = padded.abs().amax(1, keepdim=True)
    nearest = (padded / scale - levels[:, None, None]).abs().argmin(0)
    return (levels[nearest] * scale).flatten()[: len(flat)].view_as(weight)


def full_names(model: Path) -> dict[str, torch.Size]:
    plain = AutoModelForImageTextToText.from_pretrained(model)
    return {name: parameter.shape for name, parameter in plain.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_what_it_gives_out(family: str) -> None:
    """Log-probabilities over 4-bit weights are those of the plain model with the weights that go to the engine."""
    adapter, batch = adapter_of(model_of(family)), batch_of(family)
    roles = [role for role in ("language.attention", "vision", "audio") if role.partition(".")[0] in adapter.parts]
    policy = load_policy(options_of(family, lora=Lora(2, targets=tuple(roles), quantize="nf4")), adapter)
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    plain = load_policy(options_of(family), adapter)
    with torch.no_grad():
        untouched = plain(batch)[0]
        sent = dict(PolicySource(policy.model))
        assert sent.keys() == {name for name, _ in plain.base.named_parameters()}
        for name, parameter in plain.base.named_parameters():
            assert (sent[name].shape, sent[name].dtype) == (parameter.shape, parameter.dtype), name
            parameter.copy_(sent[name])
        torch.testing.assert_close(policy(batch)[0], plain(batch)[0], rtol=0, atol=2e-5)
        assert (plain(batch)[0] - untouched).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_linear_layers_but_the_head_are_in_four_bits(tiny_model: Path, dtype: str) -> None:
    adapter = adapter_of(tiny_model)
    chosen = options(tiny_model, **QLORA, dtype=dtype)
    base, quantized = load_base(options(tiny_model, dtype=dtype), adapter), load_base(chosen, adapter)
    expected = {f"{name}.weight" for names in adapter.linear_layers(base).values() for name in names}
    small = {name for name, p in quantized.named_parameters() if p.dtype == torch.uint8}
    assert small == expected
    for name, tensor in PolicySource(quantized):
        weight = base.get_parameter(name)
        assert tensor.dtype == weight.dtype
        if name not in small:
            assert torch.equal(tensor, weight)
            continue
        assert quantized.get_parameter(name).numel() * 2 == weight.numel()
        # The scales are rounded in their turn, to 8 bits, and a value halfway between two levels goes to either.
        scale = weight.float().abs().max()
        off = (tensor.float() - rounded(weight)).abs() / scale
        assert off.median() < 5e-3 and (off > 2e-2).float().mean() < 0.02, name


def test_a_step_trains_the_adapters_alone(tiny_model: Path) -> None:
    adapter = adapter_of(tiny_model)
    engine = TorchEngine(options(tiny_model, **QLORA), adapter)
    base = dict(PolicySource(engine.policy.model))
    before = {name: p.detach().clone() for name, p in engine.policy.model.named_parameters()}
    stats = update(engine)
    assert stats["grad_norm"] > 0 and stats["metrics"]["kl"] == pytest.approx(0.0, abs=1e-9)
    changed = {name for name, p in engine.policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    # A as well as B, from the second step on; and the reference stays the rounded base.
    assert update(engine)["metrics"]["kl"] > 0
    parameters = dict(engine.policy.model.named_parameters())
    layers = adapter.linear_layers(load_base(options(tiny_model), adapter))
    adapted = {f"{name}.weight" for role in QLORA["lora"].targets for name in layers[role]}
    source = engine.weight_source(1 << 16)
    sent = dict(source)
    assert {m.name: torch.Size(m.shape) for m in source.metadata()} == full_names(tiny_model)
    assert {name: tensor.shape for name, tensor in sent.items()} == full_names(tiny_model)
    for name, tensor in sent.items():
        expected = base[name]
        if name in adapted:
            owner = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (parameters[f"{owner}.lora_{x}.default.weight"].detach().double() for x in "AB")
            delta = 32.0 / 4 * b @ a
            assert delta.abs().max() > 1e-3
            expected = (expected.double() + delta).float()
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_a_saved_model_is_the_trained_policy_also_for_peft(tiny_model: Path, tmp_path: Path) -> None:
    """transformers quantizes the base itself, peft puts the adapter on it: the same logits as of the merged model."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    adapter = adapter_of(tiny_model)
    engine = TorchEngine(options(tiny_model, **QLORA), adapter)
    update(engine)
    engine.save_pretrained(tmp_path / "model")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert {name: p.shape for name, p in merged.named_parameters()} == full_names(tiny_model)
    assert not hasattr(merged.config, "quantization_config")
    origin = json.loads((tmp_path / "model/adapter/saccade.json").read_text())
    assert origin == {"adapter": None, "dtype": "float32", "max_image_tokens": None, "quantize": "nf4"}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForImageTextToText.from_pretrained(tiny_model, quantization_config=nf4, device_map={"": "cpu"})
    adapted = PeftModel.from_pretrained(base, tmp_path / "model/adapter").train()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=2e-4)


def test_a_checkpoint_goes_on_over_the_same_rounded_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_model)
    engine = TorchEngine(options(tiny_model, **QLORA), adapter)
    update(engine)
    save_checkpoint(engine, tmp_path / "checkpoint")
    second = update(engine)
    resumed = TorchEngine(options(tiny_model, **QLORA), adapter)
    load_checkpoint(resumed, tmp_path / "checkpoint")
    again = update(resumed)
    assert again["loss"] == second["loss"] and again["grad_norm"] == second["grad_norm"]
    assert all(".lora_" in name for name, _ in resumed.state_tensors())


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install"):
        quantize_linear_layers(nn.Linear(2, 2), [])


# --- DeepSpeed --------------------------------------------------------------------------------------------------------
