"""Parts of the model and LoRA roles of every family: who has which, and which layers they are."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learner.batching.collate import collate
from learner.model.load import load_base, load_policy
from tests.helpers.learner_cases import adapter_of, make_case, make_group, options, rows_of
from vlm.config import Lora
from vlm.errors import AdapterError
from vlm.parameter_names import ParameterNames
from vlm.tiny import TINY, build_tiny

FAMILIES = sorted(TINY)


@functools.cache
def model_of(family: str) -> Path:
    return build_tiny(family, Path(tempfile.mkdtemp(prefix="saccade-")) / family)


def options_of(family: str, **changes: Any) -> Any:
    """With every kind of media that the family takes."""
    return options(model_of(family), media_kinds=tuple(adapter_of(model_of(family)).modalities), **changes)


def roles_of(family: str) -> tuple[str, ...]:
    """LoRA roles that can be named for a family."""
    adapter = adapter_of(model_of(family))
    roles = ("language.attention", "language.mlp", "vision", "projector", "audio")
    return tuple(r for r in roles if r.partition(".")[0] in adapter.parts and r not in adapter.not_adapted)


def batch_of(family: str) -> Any:
    """All kinds of media, and text alone."""
    adapter = adapter_of(model_of(family))
    mixes = [["image"], list(adapter.modalities), []] if adapter.modalities else [[], []]
    case = make_case([make_group(adapter, i, media=kinds) for i, kinds in enumerate(mixes)])
    return collate(rows_of(adapter, options_of(family), case), adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_all_linear_layers_that_are_run_and_trained(family: str) -> None:
    """Seen from outside: the modules that a batch of everything calls, and whose weight its loss has a gradient for."""
    adapter = adapter_of(model_of(family))
    policy = load_policy(options_of(family), adapter)
    roles = adapter.linear_layers(policy.base)
    linear = {name: m for name, m in policy.base.named_modules() if isinstance(m, nn.Linear)}
    called: set[str] = set()
    for name, module in linear.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    policy.base.requires_grad_(True)
    policy(batch_of(family))[0].sum().backward()
    used = {name for name in called if linear[name].weight.grad is not None}
    head = {name for name, module in linear.items() if module is policy.base.get_output_embeddings()}
    counts = Counter(name for names in roles.values() for name in names)
    assert set(counts.values()) == {1}, "a layer of two roles"
    assert set(counts) == used - head and len(head) == 1
    assert set(roles_of(family)) <= set(roles) and all(roles.values())
    assert set(roles) <= {*roles_of(family), *adapter.not_adapted}


def language(prefix: str, layers: int) -> dict[str, set[str]]:
    def names(block: str, *own: str) -> set[str]:
        return {f"{prefix}layers.{i}.{block}.{name}" for i in range(layers) for name in own}

    return {
        "language.attention": names("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        "language.mlp": names("mlp", "gate_proj", "up_proj", "down_proj"),
    }


def blocks(prefix: str, *own: str) -> set[str]:
    return {f"{prefix}.{i}.{name}" for i in range(2) for name in own}


CLIP = (*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
MERGER = {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
LINEARS = {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
EXPECTED: dict[str, dict[str, set[str]]] = {
    "qwen3": language("model.", 3),
    "qwen2_vl": {
        **language("model.language_model.", 3),
        "vision": blocks("model.visual.blocks", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        "projector": MERGER,
    },
    # Three layers of the tower, of which the last is not used.
    "llava": {
        **language("model.language_model.", 3),
        "vision": blocks("model.vision_tower.encoder.layers", *CLIP),
        "projector": LINEARS,
    },
    "smolvlm": {
        **language("model.text_model.", 3),
        "vision": blocks("model.vision_model.encoder.layers", *CLIP),
        "projector": {"model.connector.modality_projection.proj"},
    },
    "gemma3": {
        **language("model.language_model.", 2),
        "vision": blocks("model.vision_tower.encoder.layers", *CLIP),
    },
    "qwen2_5_omni": {
        **language("model.", 3),
        "vision": blocks(
            "visual.blocks", "attn.q", "attn.k", "attn.v", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
        ),
        "projector": {"visual.merger.mlp.0", "visual.merger.mlp.2"},
        "audio": {*blocks("audio_tower.layers", *CLIP[:4], "fc1", "fc2"), "audio_tower.proj"},
    },
    # The experts are no linear layers; the output layer of torch's own attention is never called.
    "aria": {
        "language.attention": language("model.language_model.", 3)["language.attention"],
        "language.mlp": {
            f"model.language_model.layers.{i}.mlp.shared_experts.{n}_proj"
            for i in range(3)
            for n in ("gate", "up", "down")
        },
        "vision": blocks("model.vision_tower.encoder.layers", *CLIP),
        "projector": {
            f"model.multi_modal_projector.{name}"
            for name in (
                *(f"cross_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "linear")),
                *("feed_forward.linear_in", "feed_forward.linear_out"),
            )
        },
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_roles_of_a_few_families_by_hand(family: str) -> None:
    adapter = adapter_of(model_of(family))
    found = adapter.linear_layers(load_base(options_of(family), adapter))
    assert {role: set(names) for role, names in found.items()} == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_of_every_family_is_trained(family: str) -> None:
    """LoRA begins as the base model, has gradients on every layer of its roles, and is all that has."""
    adapter = adapter_of(model_of(family))
    roles = roles_of(family)
    policy = load_policy(options_of(family, lora=Lora(2, targets=roles)), adapter)
    base, batch = load_policy(options_of(family), adapter), batch_of(family)
    layers = adapter.linear_layers(base.base)
    expected = {
        f"base_model.model.{name}.lora_{x}.default.weight" for role in roles for name in layers[role] for x in "AB"
    }
    logprobs, _ = policy(batch)
    with torch.no_grad():
        torch.testing.assert_close(logprobs, base(batch)[0])
    logprobs.square().sum().backward()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert set(trained) == expected
    # B begins at zero, so that A has no gradient yet but zeros.
    still = [n for n, p in trained.items() if p.grad is None or ("lora_B" in n and not p.grad.abs().max() > 0)]
    assert not still


def test_the_default_is_the_language_model() -> None:
    adapter = adapter_of(model_of("qwen2_5_vl"))
    policy = load_policy(options_of("qwen2_5_vl", lora=Lora(2)), adapter)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 3 and all(".language_model." in name for name in trained)


REFUSED = {
    ("gemma3", ("projector",)): "Gemma3Adapter, projector: it is a bare matrix and not a linear layer; choose from "
    "language.attention, language.mlp, vision$",
    ("aria", ("language.mlp",)): "AriaAdapter, language.mlp: the experts of a layer are stacked",
    ("llama", ("vision", "language.mlp")): "TextAdapter has no vision; choose from language.attention, language.mlp$",
    ("llava", ("audio", "vision")): "LlavaAdapter has no audio; choose from",
}


@pytest.mark.parametrize(("family", "targets"), REFUSED)
def test_a_role_that_a_family_does_not_have_is_refused_by_name(family: str, targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=REFUSED[family, targets]):
        load_policy(options_of(family, lora=Lora(2, targets=targets)), adapter_of(model_of(family)))


def test_a_layer_of_an_unknown_kind_is_not_passed_over() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"mixer": nn.Linear(2, 2)})

        def get_output_embeddings(self) -> None: ...

    with pytest.raises(AdapterError, match=r"model\.mixer of the language model's attention or of its mlp\?"):
        ParameterNames().linear_layers(Model())


def test_a_family_can_call_its_layers_otherwise() -> None:
    class Mixing(ParameterNames):
        language_layers = {"language.attention": ".mixer.", "language.mlp": ".ffn."}  # noqa: RUF012

    assert Mixing().lora_role("model.layers.0.mixer.q") == "language.attention"
    assert Mixing().lora_role("model.layers.0.ffn.up") == "language.mlp"
    assert Mixing().parts == ("language",)
