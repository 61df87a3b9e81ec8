"""LoRA in weight synchronisation: every trained adapter reaches the engines, or an error says which does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from learner.model.load import with_lora
from tests.helpers.weight_engines import LocalLearner, ThreadEngine
from weight_sync.source import PolicySource
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightMismatchError, tensor_digest


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)


def adapted(targets: tuple[str, ...] = ("up", "down")) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Small(), LoraConfig(r=2, lora_alpha=4, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_each_send_merges_every_adapter() -> None:
    model = adapted()
    learner, engine = LocalLearner(model), ThreadEngine("a")
    learner.form_weight_group([engine])
    for version in (1, 2):
        sync_weights(learner, [engine], version, timeout=10.0)
        for name in ("up", "down"):
            layer = getattr(model.base_model.model, name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            merged = layer.base_layer.weight + 2.0 * b @ a  # alpha / r = 2
            assert torch.allclose(engine.values[f"{name}.weight"], merged, atol=1e-6)
            assert learner.sent[f"{name}.weight"] != tensor_digest(layer.base_layer.weight)
            with torch.no_grad():
                b.add_(1.0)


@pytest.mark.parametrize("fault", ["switched off", "merged already"])
def test_an_adapter_that_is_not_in_use_ends_the_sync(fault: str) -> None:
    model = adapted()
    learner, engine = LocalLearner(model, timeout=2.0), ThreadEngine("a")
    learner.form_weight_group([engine])
    layer = model.base_model.model.down
    if fault == "switched off":
        layer.enable_adapters(False)
    else:
        layer.merge()
    with pytest.raises(WeightMismatchError, match=rf"1 LoRA layers .*down\.weight: its adapter is {fault}") as caught:
        sync_weights(learner, [engine], 1, timeout=10.0)
    assert caught.value.engines == () and engine.paused and engine.held_version == 0
    assert engine.values == {}


def test_an_adapter_on_a_weight_that_the_engine_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"down\.weight has a LoRA adapter, but the engine has no such weight"):
        PolicySource(adapted(), rename=lambda name: None if name.startswith("down") else name)
    left_out = PolicySource(adapted(("up",)), rename=lambda name: None if name.startswith("down") else name)
    assert [meta.name for meta in left_out.metadata()] == ["up.weight", "up.bias"]


def test_an_adapter_that_no_layer_has() -> None:
    model = adapted(("up",))
    model.base_model.model.down.lora_A = nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"down\.lora_A\.weight: no layer has this LoRA weight"):
        PolicySource(model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "none of the linear layers of ModuleDict is chosen"),
        (("a.a.proj", "b.proj"), r"differ in 1 of 2 layers: b\.proj"),
        (("proj", "a.proj"), r"differ in 1 of 2 layers: a\.a\.proj"),
    ],
    ids=["nothing", "not in the model", "the end of another name"],
)
def test_peft_must_adapt_what_was_chosen(layers: tuple[str, ...], message: str) -> None:
    inner = nn.ModuleDict({"proj": nn.Linear(2, 2), "a": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "a": inner})
    with pytest.raises(ValueError, match=message):
        with_lora(model, layers, rank=1, alpha=1.0)


def test_peft_adapts_what_was_chosen() -> None:
    model = with_lora(Small(), ["down"], rank=1, alpha=1.0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.down.lora_A.default.weight",
        "base_model.model.down.lora_B.default.weight",
    ]
