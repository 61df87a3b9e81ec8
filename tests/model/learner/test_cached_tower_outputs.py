"""Cached tower outputs, where the projector is trained: the tower runs once for each distinct item, and losses,
gradients and weights are those of a tower that runs in every pass."""

from __future__ import annotations

import json
import re
from collections import Counter
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.engines.torch_engine import TorchEngine
from learner.features.cache import FeatureCache
from learner.features.frozen_towers import FrozenTowers, describe_caching, make_towers
from learner.types import LearnerOptions
from tests.contracts.train_engine_contract import gradients_of
from tests.helpers.learner_cases import ROUNDED, Case, adapter_of, changed, exact_dtype
from tests.model.learner.test_cached_features import (
    assert_same,
    case_of,
    make,
    model_of,
    options_of,
    strip,
    update,
)
from vlm.config import Lora
from vlm.families.registry import ADAPTERS
from vlm.tiny import TINY, build_tiny

pytestmark = pytest.mark.usefixtures("logits_in_several_chunks")

FAMILIES = ("gemma3", "internvl", "llava_next", "qwen3_vl")
OTHERS = sorted(set(TINY) - {*FAMILIES, "llama", "qwen2", "qwen3"})
ALL = [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)]
ATTENTION = re.compile(r"\.(blocks|layers?)\.\d+\.(attn|self_attn|attention)$")
VISION = {"freeze": ("vision",)}


def tower_runs(engine: Any) -> Counter[str]:
    """Forward calls, from now on, of the attention of each layer of the vision towers, of policy and reference."""
    counts: Counter[str] = Counter()
    for whose, policy in (("policy", engine.policy), ("reference", engine._reference)):
        for name, module in policy.base.named_modules() if policy is not None else ():
            if engine.adapter.role(f"{name}.") == "vision" and ATTENTION.search(name):
                counts[f"{whose}: {name}"] = 0
                module.register_forward_hook(lambda *_, key=f"{whose}: {name}": counts.update([key]))
    return counts


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in engine.policy.model.named_parameters()}


def assert_updates_are_the_same(chosen: LearnerOptions, case: Case, adapter: Any = None) -> tuple[Any, FrozenTowers]:
    """Two updates on the same media, with and without a cache. Returns the engine with it, and its towers.

    In float64: families sum a batch's images in another order than each alone, and in float32 Adam makes a whole step
    of a gradient that is nothing but what this rounds."""
    adapter = adapter or adapter_of(Path(chosen.model.path))
    chosen = changed(chosen, dtype=exact_dtype(Path(chosen.model.path)))
    plain, none = make(changed(chosen, feature_cache_gib=0.0), adapter)
    engine, towers = make(chosen, adapter)
    assert none is None and towers is not None
    for number in range(2):
        ours, exact = update(engine, chosen, case, towers), update(plain, chosen, case, None)
        if number == 0:
            assert ours["loss"] == pytest.approx(exact["loss"], rel=ROUNDED)
            gradients, expected = gradients_of(engine, chosen), gradients_of(plain, chosen)
            scale = max(float(g.abs().max()) for g in expected.values())
            assert scale > 0.01 and gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=ROUNDED * scale, msg=name)
    assert_same(strip(ours), exact)
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(engine)[name], value, rtol=0, atol=ROUNDED, msg=name)
    return engine, towers


@pytest.mark.parametrize("family", ALL)
def test_two_updates_are_those_of_a_tower_that_runs_in_every_pass(family: str) -> None:
    """Of images of different sizes (and tiles) in one batch, text alone, and videos where the family takes them. The
    projector is trained."""
    chosen = options_of(model_of(family), **VISION)
    engine, towers = assert_updates_are_the_same(chosen, case_of(adapter_of(model_of(family))))
    kinds = [kind for kind in engine.adapter.towers() if kind != "audio"]
    assert towers.cached.features == () and [*towers.cached.dummy_outputs] == kinds
    assert engine.cached() == dict.fromkeys(kinds, "tower outputs")
    projector = [name for name in parameters(engine) if engine.adapter.role(name) == "projector"]
    assert projector and all(gradients_of(engine, chosen)[name].abs().max() > 0 for name in projector)


@pytest.mark.parametrize("family", ALL)
def test_the_tower_runs_once_for_each_distinct_item_and_each_dummy(family: str) -> None:
    adapter, chosen = adapter_of(model_of(family)), options_of(model_of(family), **VISION)
    case = case_of(adapter)
    engine, towers = make(chosen, adapter)
    assert towers is not None
    runs = tower_runs(engine)
    first, second = (update(engine, chosen, case, towers)["metrics"] for _ in range(2))
    items = len({m.digest for g in case.groups for m in g.prompt.media if m.kind != "audio"})
    assert {whose.partition(":")[0]: n for whose, n in runs.items()} == {
        "policy": items + len(engine.cached()),
        "reference": 0,
    }
    assert len(set(runs.values())) == 2
    assert [first[name] for name in ("features_computed", "features_reused")] == [items, 0]
    assert [second[name] for name in ("features_computed", "features_reused")] == [0, items]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_what_was_given_for_another_item_is_another_loss(family: str) -> None:
    """The comparisons above would see outputs that are another item's."""
    adapter, chosen = adapter_of(model_of(family)), options_of(model_of(family), **VISION)
    wrong = copy(adapter)
    wrong.join_tower_outputs = lambda rows: tuple(t.flip(0) for t in adapter.join_tower_outputs(rows))  # type: ignore[method-assign]
    losses = []
    for own in (adapter, wrong):
        engine, towers = make(chosen, own)
        losses.append(update(engine, chosen, case_of(adapter), towers)["loss"])
    assert abs(losses[0] - losses[1]) > 1e-4


def test_layers_of_the_tower_may_be_checkpointed() -> None:
    for family in ("qwen2_5_vl", "qwen3_vl", "internvl"):
        chosen = options_of(model_of(family), **VISION, gradient_checkpointing=("language", "vision"))
        assert_updates_are_the_same(chosen, case_of(adapter_of(model_of(family))))


def test_several_layers_of_a_tower_may_be_used(tmp_path: Path) -> None:
    model = build_tiny("llava_next", tmp_path / "several")
    config = json.loads((model / "config.json").read_text())
    width = config["vision_config"]["hidden_size"]
    (model / "config.json").write_text(json.dumps({**config, "vision_feature_layer": [-3, -2]}))
    weights = load_file(model / "model.safetensors")
    (name,) = (n for n in weights if n.endswith("multi_modal_projector.linear_1.weight"))
    assert weights[name].shape[1] == width
    save_file(
        {**weights, name: torch.cat([weights[name], -weights[name]], 1)}, model / "model.safetensors", {"format": "pt"}
    )
    assert_updates_are_the_same(options_of(model, **VISION), case_of(adapter_of(model)))


def test_what_has_left_the_cache_is_computed_again() -> None:
    adapter, chosen = adapter_of(model_of("internvl")), options_of(model_of("internvl"), **VISION)
    plain, _ = make(chosen, adapter, cached=False)
    engine, _ = make(chosen, adapter)
    towers = FrozenTowers(engine, adapter, chosen, FeatureCache(0))
    for _ in range(2):
        stats = update(engine, chosen, case_of(adapter), towers)
        assert_same(strip(stats), update(plain, chosen, case_of(adapter), None))
        assert stats["metrics"]["features_computed"] == 5


def test_a_trained_projector_of_images_leaves_sounds_alone() -> None:
    chosen = options_of(model_of("qwen2_5_omni"), freeze=("vision", "audio"))
    _, towers = assert_updates_are_the_same(chosen, case_of(adapter_of(model_of("qwen2_5_omni"))))
    assert towers.cached.features == ("audio",) and [*towers.cached.dummy_outputs] == ["image", "video"]
    engine, _ = make(changed(chosen, freeze=("audio",)), adapter_of(model_of("qwen2_5_omni")))
    assert engine.cached() == {"audio": "features"}


def test_lora_on_the_projector_leaves_tower_outputs_cached_and_on_the_tower_nothing() -> None:
    model = model_of("llava_next")
    chosen = options_of(model, lora=Lora(2, targets=("language.attention", "projector")))
    engine, towers = assert_updates_are_the_same(chosen, case_of(adapter_of(model)))
    assert [*towers.cached.dummy_outputs] == ["image"]
    assert make(changed(chosen, lora=Lora(2, targets=("vision", "projector"))), engine.adapter)[1] is None


# --- what the run says ------------------------------------------------------------------------------------------------


def engine_cached(chosen: LearnerOptions, adapter: Any) -> dict[str, str]:
    engine = TorchEngine(chosen, adapter)
    return dict(engine.cached()) if make_towers(engine, adapter, chosen) is not None else {}


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_omni"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze": ("vision",)},
        {"freeze": ("vision", "projector")},
        {"freeze": ("projector",)},
        {"freeze": ("vision",), "feature_cache_gib": 0.0},
        {"lora": Lora(2)},
        {"lora": Lora(2, targets=("vision",))},
    ],
)
def test_a_run_says_what_it_does(family: str, changes: dict[str, Any]) -> None:
    model = model_of(family)
    adapter, chosen = adapter_of(model), options_of(model, kl=None, **changes)
    cached = engine_cached(chosen, adapter)
    said = describe_caching(adapter, chosen)
    for what in ("features", "tower outputs"):
        lines = [line.partition(": ") for line in said if f": {what} are computed once per run and cached" in line]
        named = {kind for kinds, _, _ in lines for kind in kinds.split(" and ")}
        assert named == {kind for kind, own in cached.items() if own == what}
    in_every_pass = [line for line in said if "runs in every pass because feature_cache_gib is 0" in line]
    assert bool(in_every_pass) == (changes.get("feature_cache_gib") == 0.0)


@pytest.mark.parametrize("family", ["gemma3", "internvl"])
def test_a_tower_may_give_the_states_of_all_its_layers(tmp_path: Path, family: str) -> None:
    """What these families use is behind the norm that follows the last layer."""
    model = build_tiny(family, tmp_path / family)
    config = json.loads((model / "config.json").read_text())
    config["vision_config"]["output_hidden_states"] = True
    (model / "config.json").write_text(json.dumps(config))
    assert_updates_are_the_same(options_of(model, **VISION), case_of(adapter_of(model)))


def test_what_is_trained_before_a_frozen_tower_is_an_error() -> None:
    adapter, chosen = adapter_of(model_of("qwen2_5_vl")), options_of(model_of("qwen2_5_vl"), **VISION)
    engine, towers = make(chosen, adapter)
    engine.policy.base.model.visual.patch_embed.requires_grad_(True)
    with pytest.raises(RuntimeError, match="depends on a parameter that is trained, but its tower counts as frozen"):
        update(engine, chosen, case_of(adapter), towers)


def test_a_family_may_not_say_where_its_tower_ends() -> None:
    adapter = copy(adapter_of(model_of("internvl")))
    adapter.tower = None  # type: ignore[misc]
    chosen = options_of(model_of("internvl"), **VISION)
    assert make(chosen, adapter)[1] is None
    assert describe_caching(adapter, chosen) == [
        "image and video: the frozen tower runs in every pass because InternVLAdapter does not say where its projector "
        "begins"
    ]


def test_every_family_with_a_tower_says_where_it_ends() -> None:
    assert {name for name, adapter in ADAPTERS.items() if adapter.tower is None} == {"llama", "qwen2", "qwen3"}


# --- ranks ------------------------------------------------------------------------------------------------------------
