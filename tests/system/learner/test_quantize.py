"""QLoRA: adapters are trained over weights in 4 bits, and the engine gets what the learner computes with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from learner.durable import seal
from learner.engines.checkpoint import load_checkpoint, save_checkpoint
from learner.engines.torch_engine import TorchEngine
from learner.model.load import load_base
from learner.types import LearnerOptions
from saccade.checkpoints import FORMAT
from saccade.commands.merge import merge
from saccade.config.load import config_tree, parse_config
from tests.helpers.learner_cases import adapter_of, options
from tests.helpers.ranks import run_ranks
from tests.model.learner.test_quantize import QLORA, update
from tests.system.learner.test_learner_ranks import TWO, assert_same_update

pytestmark = pytest.mark.usefixtures("logits_in_several_chunks")

TEN = {"micro_batch": 90, "learning_rate": 1e-2}


VARIANTS: dict[str, dict[str, Any]] = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 2, optimizer offloaded, checkpointing": {
        "zero_stage": 2,
        "offload": "optimizer",
        "gradient_checkpointing": ("language",),
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(v, id=name, marks=pytest.mark.slow if name in ("zero 0", "zero 1") else ())
        for name, v in VARIANTS.items()
    ],
)
def test_deepspeed_updates_as_plain_torch_does(
    tiny_model: Path, process_group: None, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    chosen = options(tiny_model, **QLORA, **TEN)
    torch_engine = TorchEngine(chosen, adapter_of(tiny_model))
    engine = DeepSpeedEngine(options(tiny_model, **QLORA, **TEN, **changes), adapter_of(tiny_model))
    for _ in range(2):
        assert_same_update(update(engine), update(torch_engine))
    for (name, ours), (_, theirs) in zip(
        engine.weight_source(1 << 16), torch_engine.weight_source(1 << 16), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)
    save_checkpoint(engine, tmp_path / "checkpoint")
    third = update(engine)
    resumed = DeepSpeedEngine(engine.options, adapter_of(tiny_model))
    load_checkpoint(resumed, tmp_path / "checkpoint")
    assert update(resumed)["grad_norm"] == third["grad_norm"]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bfloat16_keeps_the_base_in_four_bits(
    tiny_model: Path, process_group: None, tmp_path: Path, stage: int
) -> None:
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    chosen = options(tiny_model, **QLORA, **TEN, dtype="bfloat16", zero_stage=stage)
    engine = DeepSpeedEngine(chosen, adapter_of(tiny_model))
    before = {name: t.clone() for name, t in engine.weight_source(1 << 16)}
    exact = TorchEngine(options(tiny_model, **QLORA, **TEN), adapter_of(tiny_model))
    assert update(engine)["grad_norm"] == pytest.approx(update(exact)["grad_norm"], rel=0.05)
    assert update(engine)["metrics"]["kl"] > 0
    small = [p for p in engine.policy.model.parameters() if p.dtype == torch.uint8]
    assert len(small) == sum(
        map(len, exact.adapter.linear_layers(load_base(options(tiny_model), exact.adapter)).values())
    )
    sent = dict(engine.weight_source(1 << 16))
    assert all(tensor.dtype == torch.bfloat16 for tensor in sent.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in sent.items())
    engine.save_pretrained(tmp_path / "model")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert all(torch.equal(p, sent[name]) for name, p in saved.named_parameters())
    # A checkpoint has the adapters in float32; merged is what the engines got.
    save_checkpoint(engine, tmp_path / "step/learner")
    lora = asdict(QLORA["lora"])
    tree = {"output_dir": "x", "steps": 2, "model": {"path": str(tiny_model), "lora": lora}, "data": {"train": ["a"]}}
    state = {"format": FORMAT, "config": config_tree(parse_config(tree))}
    (tmp_path / "step/run.json").write_text(json.dumps(state))
    seal(tmp_path / "step")
    merge(tmp_path / "step", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="bfloat16")
    assert all(torch.equal(p, sent[name]) for name, p in merged.named_parameters())


def two_ranks(rank: int, model: Path, out: Path) -> None:
    from learner.engines.deepspeed_engine import DeepSpeedEngine

    for stage in (0, 1, 2):
        chosen: LearnerOptions = options(model, **QLORA, **TEN, ranks=2, zero_stage=stage)
        engine = DeepSpeedEngine(chosen, adapter_of(model))
        stats = [update(engine, TWO[rank]) for _ in range(2)]
        weights = {name: tensor.clone() for name, tensor in engine.weight_source(1 << 16)}
        if rank == 0:
            (out / f"{stage}.json").write_text(json.dumps(stats))
            save_file(weights, out / f"{stage}.safetensors")


@pytest.mark.slow
def test_two_ranks_train_as_one(tiny_model: Path, tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tiny_model, tmp_path)
    engine = TorchEngine(options(tiny_model, **QLORA, **TEN), adapter_of(tiny_model))
    expected = [update(engine) for _ in range(2)]
    weights = dict(engine.weight_source(1 << 16))
    for stage in (0, 1, 2):
        for ours, one in zip(json.loads((tmp_path / f"{stage}.json").read_text()), expected, strict=True):
            assert_same_update(ours, one)
        sent = load_file(tmp_path / f"{stage}.safetensors")
        for name, tensor in weights.items():
            torch.testing.assert_close(sent[name], tensor, rtol=0, atol=2e-4, msg=name)
