"""`saccade merge` of adapters that peft has made: merged as peft merges them, or refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from saccade.commands.merge import MergeError, merge
from saccade.commands.peft_fields import MERGED, REFUSED, field_problems


def test_every_field_of_pefts_configuration_is_judged() -> None:
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names == MERGED | {*REFUSED} and not MERGED & {*REFUSED}
    assert field_problems(LoraConfig(r=2).to_dict()) == []


def adapter(model: Path, directory: Path, **settings: Any) -> None:
    """A trained adapter: everything that it trains is moved."""
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(**settings))
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(directory)


PLAIN: dict[str, dict[str, Any]] = {
    "scales": {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "rank_pattern": {"qkv": 2},
        "alpha_pattern": {"k_proj": 5},
        "target_modules": ["q_proj", "k_proj", "qkv"],
        "exclude_modules": ["model.language_model.layers.1.self_attn.q_proj"],
        "lora_dropout": 0.3,
        "fan_in_fan_out": True,
        "bias": "all",
        "init_lora_weights": "gaussian",
    },
    "layers": {
        "r": 2,
        "target_modules": ["up_proj", "q_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "bias": "lora_only",
        "init_lora_weights": False,
    },
    "all-linear": {"r": 2, "target_modules": "all-linear", "init_lora_weights": "orthogonal"},
    "pissa": {"r": 2, "target_modules": ["k_proj"], "init_lora_weights": "pissa"},
    "olora": {"r": 2, "target_modules": ["k_proj"], "init_lora_weights": "olora"},
    "eva": {"r": 2, "target_modules": ["k_proj"], "init_lora_weights": "eva"},
}
"""Every field of MERGED that moves a weight, beside those that only say where the adapter comes from."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN.keys())
def test_what_is_merged_is_what_peft_merges(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter(tiny_model, tmp_path / "adapter", **settings)
    merge(tmp_path / "adapter", tmp_path / "merged", model=str(tiny_model))
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    untouched = {name: p.detach().clone() for name, p in base.named_parameters()}
    expected = dict(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    found = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").named_parameters())
    assert found.keys() == expected.keys()
    assert any((expected[name] - before).abs().max() > 1e-2 for name, before in untouched.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


FORBIDDEN: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "use_dora": {"use_dora": True},
    "trainable_token_indices": {"trainable_token_indices": [5]},
    "target_parameters": {"target_parameters": ["layers.0.mlp.up_proj.weight"]},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_2"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("field", "settings"), FORBIDDEN.items())
def test_an_adapter_that_is_no_plain_lora_is_refused(
    tiny_model: Path, tmp_path: Path, field: str, settings: dict[str, Any]
) -> None:
    adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["qkv"], **settings)
    with pytest.raises(MergeError, match=f"cannot be merged: {field}="):
        merge(tmp_path / "adapter", tmp_path / "out", model=str(tiny_model))
    assert not (tmp_path / "out").exists()


def test_what_the_installed_peft_would_pass_over_is_refused() -> None:
    (problem,) = field_problems({"init_lora_weights": True, "use_newest_trick": True})
    assert problem == "use_newest_trick=True: the installed peft does not know it"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_the_output_head_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """The head here is tied to the embeddings, which peft's own merge would change with it."""
    adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["lm_head"])
    with pytest.raises(MergeError, match="has no separate linear head"):
        merge(tmp_path / "adapter", tmp_path / "out", model=str(tiny_model))
