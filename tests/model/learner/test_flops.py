"""Operations of a step against counts by hand, and against those that torch counts as it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from learner.config import Kl
from learner.model.load import load_policy
from learner.plan.flops import Flops, GroupShape, forward_flops, step_flops
from learner.plan.model_shape import describe
from learner.types import LearnerOptions
from tests.helpers.learner_cases import adapter_of, options
from vlm.tiny import TinySizes, build_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("flops") / "llama", sizes=TinySizes(layers=2))


def test_pairs_count_the_prompt_once() -> None:
    group = GroupShape(prompt=10, completions=[4, 6])
    assert group.tokens == 20
    assert group.pairs == 50 + (4 * 10 + 8) + (6 * 10 + 18)


def options_of(model: Path, **changes: Any) -> LearnerOptions:
    return options(model, **{"kl": None, **changes})


def test_by_hand(model: Path) -> None:
    H, wide, layers = 128, 256, 2
    adapter = adapter_of(model)
    V = len(adapter.tokenizer)
    options = options_of(model)
    shape = describe(options, adapter)
    group = GroupShape(10, [4, 6])
    weights = 2 * H * H + H * H + 3 * H * wide
    once = forward_flops(shape, [group])
    assert once == Flops(2 * layers * weights * 20, 4 * layers * H * group.pairs, head=2 * V * H * 10)
    step = step_flops(shape, options, [group])
    assert step == once.times(language=3, vision=1, projector=1, head=4)
    recomputed = options_of(model, gradient_checkpointing=("language",))
    assert step_flops(shape, recomputed, [group]).language == 4 * once.language
    several = options_of(model, kl=Kl(0.1), optimizer_steps=2)
    assert step_flops(shape, several, [group]).total == pytest.approx(step.total + 1.5 * once.total)


def test_a_frozen_tower_whose_outputs_are_kept_counts_once(tmp_path: Path) -> None:
    """In units of a pass forward; all with a reference, which is one pass more."""
    model = build_tiny("qwen2_5_vl", tmp_path / "model", sizes=TinySizes(layers=1))

    def counted(**changes: Any) -> tuple[float, float]:
        options = options_of(model, kl=Kl(0.1), gradient_checkpointing=("vision",), **changes)
        shape = describe(options, adapter_of(model))
        group = GroupShape(80, [4, 6], images=[256])
        once, step = forward_flops(shape, [group]), step_flops(shape, options, [group])
        return step.vision / once.vision, step.projector / once.projector

    assert counted() == (1 + 2 + 1 + 1, 1 + 2 + 1)  # the tower is computed again in its backward
    assert counted(freeze=("vision",)) == (1, 1 + 2 + 1)
    assert counted(freeze=("vision",), feature_cache_gib=0) == (2, 1 + 2 + 1)
    assert counted(freeze=("vision", "projector")) == (1, 1)
    assert counted(freeze=("vision", "projector"), feature_cache_gib=0) == (2, 2)
    assert counted(freeze=("projector",)) == (1 + 2 + 1 + 1, 1 + 1 + 1)


def test_layers_with_windows_see_less(tmp_path: Path) -> None:
    model = build_tiny("qwen2_5_vl", tmp_path / "model", sizes=TinySizes(layers=1))
    shape = describe(options_of(model), adapter_of(model))
    tower = shape.vision
    assert tower is not None and tower.layers > tower.full_layers == 1 and tower.window == 64

    def vision(window: int | None, patches: int) -> float:
        seen = replace(shape, vision=replace(tower, window=window))
        return forward_flops(seen, [GroupShape(8, [1], images=[patches])]).vision

    # 64 patches are one window; of 256 each sees 64 instead of 256, in all layers but one.
    assert vision(64, 64) == vision(None, 64)
    fewer = 4 * tower.layer.query * (tower.layers - 1) * 256 * (256 - 64)
    assert vision(None, 256) - vision(64, 256) == fewer


def test_torch_counts_as_many(model: Path) -> None:
    """Linear layers, forward and backward; attention's kernels on a CPU are not in torch's table."""
    adapter = adapter_of(model)
    options = options_of(model)
    policy = load_policy(options, adapter)
    ids = torch.randint(5, 100, (1, 64))
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(64)[None]}
    with FlopCounterMode(display=False) as counted:
        adapter.hidden_states(policy.base, input_ids=ids, **given).sum().backward()
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    shape = describe(options, adapter)
    assert products == pytest.approx(3 * forward_flops(shape, [GroupShape(64, [])]).language, rel=0.02)
