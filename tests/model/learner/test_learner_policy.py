"""PolicyModule: the log-probabilities of every layout of a batch are those of the Hugging Face model's own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.batching.collate import collate, collate_packed, collate_padded
from learner.batching.costs import row_costs
from learner.batching.rows import TrainingRow, encode_prompts, make_rows, to_sample
from learner.model.load import load_policy
from learner.model.policy import PolicyModule
from learner.types import LearnerOptions
from rollout.types import GroupSummary
from tests.helpers.learner_cases import adapter_of, changed, expected_update, make_group, mixed_case, options
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.config import Lora, ModelConfig

pytestmark = pytest.mark.usefixtures("logits_in_several_chunks")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> MultimodalAdapter:
    return adapter_of(tiny_model)


@pytest.fixture(scope="module")
def policy(tiny_model: Path, adapter: MultimodalAdapter) -> PolicyModule:
    return load_policy(options(tiny_model, temperature=0.8), adapter)


ROOM = LearnerOptions(ModelConfig(""), 1)


def all_rows(adapter: MultimodalAdapter, shared: bool = True, room: LearnerOptions = ROOM) -> list[TrainingRow]:
    case = mixed_case(adapter)
    prompts = encode_prompts(adapter, case.groups, case.media)
    rows = []
    for group, prompt in zip(case.groups, prompts, strict=True):
        rows += make_rows(prompt, [to_sample(c) for c in group.completions], adapter, room, shared=shared)
    return rows


def flat(batch: MultimodalBatch, values: Tensor) -> Tensor:
    return values[batch.loss_mask]


@pytest.mark.parametrize("layout", ["padded", "packed, not shared", "some in parts", "packed", "under a mask"])
def test_every_layout_gives_the_models_own_logprobs(
    tiny_model: Path, adapter: MultimodalAdapter, policy: PolicyModule, layout: str, monkeypatch: pytest.MonkeyPatch
):
    case, chosen = mixed_case(adapter), options(tiny_model, temperature=0.8)
    expected = expected_update(tiny_model, case, chosen).logprobs
    room = changed(ROOM, micro_batch=80) if layout == "some in parts" else ROOM
    rows = all_rows(adapter, layout not in ("padded", "packed, not shared"), room)
    assert len(rows) == {"packed": 4, "under a mask": 4, "some in parts": 6}.get(layout, 16)
    batch = (collate_padded if layout == "padded" else collate_packed)(rows, adapter)
    monkeypatch.setattr(policy, "attention", "mask" if layout == "under a mask" else "blocks")
    with torch.no_grad():
        logprobs, entropy = policy(batch)
    assert (logprobs[~batch.loss_mask] == 0).all() and (entropy[~batch.loss_mask] == 0).all()
    assert (entropy[batch.loss_mask] > 0).all()
    everything = {
        tuple(c.segments[0].token_ids): values
        for group, own in zip(case.groups, expected, strict=True)
        for c, values in zip(group.completions, own, strict=True)
    }
    in_rows = [everything[tuple(s.token_ids.tolist())] for row in rows for s in row.samples]
    assert len(in_rows) == len(everything)
    torch.testing.assert_close(flat(batch, logprobs).double(), torch.cat(in_rows), rtol=0, atol=3e-5)


def test_the_image_matters(adapter: MultimodalAdapter, policy: PolicyModule):
    batch = collate(all_rows(adapter), adapter)
    assert batch.pixel_values is not None
    with torch.no_grad():
        seen, _ = policy(batch)
        blind, _ = policy(replace(batch, pixel_values=torch.zeros_like(batch.pixel_values)))
    assert (seen - blind).abs().max() > 0.05  # or equality above would prove nothing about images


def test_siblings_do_not_see_each_other(adapter: MultimodalAdapter, policy: PolicyModule):
    group = make_group(adapter, 0)
    (prompt,) = encode_prompts(adapter, [group], {m.digest: m.data for m in group.prompt.media})
    samples = [to_sample(c) for c in group.completions]
    other = replace(samples[0], token_ids=(samples[0].token_ids + 7) % 250)
    with torch.no_grad():
        first, second = (
            policy(collate([TrainingRow(prompt, (s, *samples[1:]))], adapter))[0] for s in (samples[0], other)
        )
    changed = slice(len(prompt.input_ids), len(prompt.input_ids) + len(samples[0]))
    assert (first[:, changed] != second[:, changed]).any()
    assert torch.equal(first[:, changed.stop :], second[:, changed.stop :])


@pytest.mark.parametrize("kind", ["text only", "nothing trained", "no rows"])
def test_every_parameter_is_in_the_graph_of_every_batch(adapter: MultimodalAdapter, policy: PolicyModule, kind: str):
    if kind == "no rows":
        batch = collate([], adapter)
    else:
        group = make_group(adapter, 1, images=0)
        (prompt,) = encode_prompts(adapter, [group], {})
        batch = collate(make_rows(prompt, [to_sample(c) for c in group.completions], adapter, ROOM), adapter)
    if kind == "nothing trained":
        batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    policy.zero_grad()
    logprobs, _ = policy(batch)
    assert logprobs.shape == batch.input_ids.shape
    logprobs.sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters()}
    assert all(g is not None for g in gradients.values()), [n for n, g in gradients.items() if g is None]
    # The dummy image counts for nothing: the vision tower's gradient is exactly zero.
    assert all((g == 0).all() for name, g in gradients.items() if ".visual." in name and g is not None)
    learned = any((g != 0).any() for g in gradients.values() if g is not None)
    assert learned == (kind == "text only")


@pytest.mark.parametrize("roles", [("language",), ("vision",), ("language", "vision")], ids=" and ".join)
def test_gradient_checkpointing_computes_the_chosen_layers_twice_and_the_same(
    tiny_model: Path, adapter: MultimodalAdapter, roles: tuple[str, ...]
):
    batch = collate(all_rows(adapter), adapter)
    gradients, calls = [], []
    for chosen in ((), roles):
        module = load_policy(options(tiny_model, gradient_checkpointing=chosen), adapter)
        calls.append({"language": 0, "vision": 0})
        layers = {
            "language": module.model.model.language_model.layers[0],
            "vision": module.model.model.visual.blocks[0],
        }
        for role, layer in layers.items():
            layer.mlp.register_forward_pre_hook(lambda *_, r=role, c=calls[-1]: c.update({r: c[r] + 1}))
        module(batch)[0].sum().backward()
        gradients.append({name: p.grad for name, p in module.model.named_parameters()})
    assert calls == [{"language": 1, "vision": 1}, {role: 1 + (role in roles) for role in ("language", "vision")}]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


def test_freezing_the_vision_tower(tiny_model: Path, adapter: MultimodalAdapter):
    module = load_policy(options(tiny_model, freeze=("vision",)), adapter)
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    tower = {name for name, _ in module.model.named_parameters() if ".visual." in name}
    assert frozen and frozen == {name for name in tower if ".visual.merger." not in name}  # the projector is trained


def test_lora_starts_as_the_base_and_its_reference_stays_so(tiny_model: Path, adapter: MultimodalAdapter):
    chosen = options(tiny_model, lora=Lora(2, targets=("projector", "language.mlp")))
    module, base = load_policy(chosen, adapter), load_policy(options(tiny_model), adapter)
    trained = [name for name, p in module.model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name and (".visual.merger." in name or ".mlp." in name) for name in trained)
    assert not [name for name in trained if ".visual." in name and ".merger." not in name]
    batch = collate(all_rows(adapter), adapter)
    with torch.no_grad():
        expected = base(batch)[0]
        torch.testing.assert_close(module(batch)[0], expected)
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.allclose(module(batch)[0], expected, atol=1e-3)
        torch.testing.assert_close(module(batch, reference=True)[0], expected)


REFUSED = {
    "a part frozen that is adapted": (
        {"freeze": ("language",), "lora": Lora(2)},
        "language.attention, language.mlp, which",
    ),
    "no targets": ({"lora": Lora(2, targets=())}, "lora.targets is empty"),
    "everything frozen": ({"freeze": ("vision", "projector", "audio", "language")}, "names every part"),
    "all that is there frozen": ({"freeze": ("vision", "projector", "language")}, "nothing would be trained: frozen"),
    "no such part": ({"freeze": ("audio",)}, "QwenVLAdapter has no audio; it has language, vision, projector"),
    "no such role": (
        {"lora": Lora(2, targets=("audio",))},
        "has no audio; choose from language.attention, language.mlp, vision, projector",
    ),
    "a role that no data reach": (
        {"lora": Lora(2, targets=("vision",)), "media_kinds": ()},
        "nothing would be trained: LoRA is on vision; media of the data: none",
    ),
    "4 bits under ZeRO-3": ({"lora": Lora(2, quantize="nf4"), "zero_stage": 3}, "zero_stage=3 has not been tested"),
    "4 bits offloaded": (
        {"lora": Lora(2, quantize="nf4"), "offload": "parameters"},
        "offload=parameters has not been tested",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_by_name(
    tiny_model: Path, adapter: MultimodalAdapter, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        load_policy(options(tiny_model, **changes), adapter)


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_each_part_can_be_frozen(tiny_model: Path, adapter: MultimodalAdapter, part: str):
    module = load_policy(options(tiny_model, freeze=(part,)), adapter)
    frozen = {adapter.role(name) for name, p in module.model.named_parameters() if not p.requires_grad}
    trained = {adapter.role(name) for name, p in module.model.named_parameters() if p.requires_grad}
    assert (frozen, trained) == ({part}, {"vision", "projector", "language"} - {part})


def test_a_model_that_bends_its_logits_is_refused(tiny_model: Path, adapter: MultimodalAdapter):
    module = load_policy(options(tiny_model), adapter)
    module.base.config.get_text_config().final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0"):
        PolicyModule(module.base, adapter, temperature=1.0)


def test_a_token_of_an_image_costs_its_share_of_the_tower(
    tiny_model: Path, adapter: MultimodalAdapter, policy: PolicyModule
):
    """Of the linear layers that a token passes: four patches each, one token, and no embedding or head."""
    linear = {n: p.numel() for n, p in policy.base.named_parameters() if p.ndim == 2 and "embed" not in n}
    tower = sum(size for n, size in linear.items() if n.startswith("model.visual.blocks."))
    language = sum(size for n, size in linear.items() if n.startswith("model.language_model."))
    assert policy.media_cost == pytest.approx(4 * tower / language)
    assert load_policy(options(tiny_model, freeze=("vision",)), adapter).media_cost == 0

    case = mixed_case(adapter)
    rows = [row for row in all_rows(adapter) if row.prompt.counts.get("image", 0) == 1][:1]
    tokens = int((rows[0].prompt.input_ids == adapter.placeholder_ids["image"]).sum())
    summary = next(s for g in case.groups if len(g.prompt.media) == 1 for s in [GroupSummary.of(g)])
    assert summary.media_length == tokens > 1
    with_tower, without = row_costs(rows, adapter, 0.5), row_costs(rows, adapter, 0.0)
    assert with_tower[0] - without[0] == pytest.approx(0.5 * tokens)
