"""`saccade merge`: adapters and checkpoints become models that transformers loads."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from learner.durable import seal
from learner.engines.checkpoint import save_checkpoint
from learner.engines.torch_engine import TorchEngine
from saccade import cli
from saccade.checkpoints import FORMAT
from saccade.commands.merge import MergeError, merge
from saccade.config.load import config_tree, parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import learner_options
from tests.helpers.learner_cases import adapter_of, options
from tests.model.learner.test_quantize import QLORA
from vlm.config import Lora
from vlm.errors import AdapterError
from vlm.families.qwen_vl import QwenVLAdapter
from vlm.families.registry import load_adapter
from vlm.tiny import build_tiny


def trained(model: Path, **changes: Any) -> TorchEngine:
    """An engine whose trained parameters are not those it started with."""
    return moved(TorchEngine(options(model, **changes), load_adapter(str(model))))


def moved(engine: TorchEngine) -> TorchEngine:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return engine


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its adapter, as a run leaves it."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    trained(tiny_model, lora=Lora(3, targets=("language.mlp", "vision"))).save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(30)[None]).logits


@pytest.mark.parametrize("part", ["", "adapter"])
def test_an_adapter_of_a_run_becomes_the_model_that_the_run_saved(
    saved: Path, tiny_model: Path, tmp_path: Path, part: str
) -> None:
    merge(saved / part, tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", saved)
    assert not (tmp_path / "merged/adapter").exists()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(base, saved / "adapter")
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=2e-5)
    assert load_adapter(str(tmp_path / "merged")).tokenizer.get_vocab()  # the processor is there too


def test_a_base_that_was_moved_is_named(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    with pytest.raises(AdapterError, match="/gone"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "adapter", tmp_path / "merged", model=str(tiny_model))
    assert_same_weights(tmp_path / "merged", saved)


@pytest.mark.parametrize("limit", [None, 16])
def test_an_adapter_alone_remembers_how_large_images_were(tiny_model: Path, tmp_path: Path, limit: int | None) -> None:
    family = load_adapter(str(tiny_model), max_image_tokens=limit)
    TorchEngine(options(tiny_model, lora=Lora(2), max_image_tokens=limit), family).save_pretrained(tmp_path / "model")
    shutil.move(tmp_path / "model/adapter", tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "merged") == ""
    assert load_adapter(str(tmp_path / "merged")).most_image_tokens() == family.most_image_tokens()
    assert (family.most_image_tokens() <= 16) == (limit is not None)


def test_an_adapter_over_four_bits_is_merged_into_the_rounded_base(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trained(tiny_model, **QLORA).save_pretrained(tmp_path / "model")
    merge(tmp_path / "model/adapter", tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", tmp_path / "model")


def test_an_adapter_of_another_program(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "qkv"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    remark = merge(tmp_path / "adapter", tmp_path / "merged", model=str(tiny_model))
    assert "does not record an image token limit" in remark
    expected = logits(model.merge_and_unload())
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_family_that_is_saved_under_other_names(tmp_path: Path) -> None:
    model = build_tiny("qwen2_5_omni", tmp_path / "base")
    engine = trained(model, lora=Lora(2, targets=("audio", "language.attention")), media_kinds=("image", "audio"))
    engine.save_pretrained(tmp_path / "model")
    merge(tmp_path / "model", tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", tmp_path / "model")
    assert all(name.startswith("thinker.") for name in weights(tmp_path / "merged"))


def checkpoint(model: Path, directory: Path, **settings: Any) -> TorchEngine:
    """Of a run on text alone, so that the run put no adapter on the vision tower."""
    tree = {
        "output_dir": "x",
        "steps": 2,
        "model": {"path": str(model), "dtype": "float32", **settings},
        "data": {"train": ["a"]},
    }
    config = parse_config(tree)
    engine = moved(TorchEngine(learner_options(config, "cpu", ()), adapter_of(model)))
    save_checkpoint(engine, directory / "learner")
    (directory / "run.json").write_text(json.dumps({"format": FORMAT, "config": config_tree(config)}))
    seal(directory)
    return engine


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "targets": ["vision", "language.mlp"]}},
    "qlora": {"lora": {"rank": 2, "quantize": "nf4"}},
    "full": {"freeze": ["projector"]},
}


@pytest.mark.parametrize("settings", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_checkpoint_of_a_run_that_never_ended(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    if "quantize" in settings.get("lora", {}):
        pytest.importorskip("bitsandbytes")
    engine = checkpoint(tiny_model, tmp_path / "step-000001", **settings)
    engine.save_pretrained(tmp_path / "model")
    merge(tmp_path / "step-000001", tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", tmp_path / "model")


class Own(QwenVLAdapter):
    """A family of a user's own."""


def test_an_adapter_remembers_a_family_of_ones_own(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    def origin(directory: Path) -> dict[str, Any]:
        return json.loads((directory / "adapter/saccade.json").read_text())

    unlimited = {"adapter": None, "dtype": "float32", "max_image_tokens": None, "quantize": "none"}
    assert origin(saved) == unlimited
    engine = TorchEngine(options(tiny_model, lora=Lora(2)), Own.load(str(tiny_model)))
    engine.save_pretrained(tmp_path / "model")
    assert origin(tmp_path / "model")["adapter"] == f"{__name__}:Own"
    merge(tmp_path / "model", tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", tmp_path / "model")


def test_what_cannot_be_merged_is_said(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = build_tiny("qwen2_vl", tmp_path / "other")

    def message(source: Path, output: Path = tmp_path / "out", **options: Any) -> str:
        with pytest.raises((MergeError, AdapterError)) as caught:
            merge(source, output, **options)
        assert output == saved or not output.exists()
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "contains neither adapter_config.json, nor" in message(tmp_path / "empty")
    assert "already exists; name a new folder" in message(saved, saved)
    assert "no usable model at" in message(saved, model=str(tmp_path / "empty"))
    assert "does not fit the model at" in message(saved / "adapter", model=str(other))
    text = build_tiny("llama", tmp_path / "text")
    assert "is not a LoRA adapter for the model at" in message(saved / "adapter", model=str(text))

    cut = shutil.copytree(saved / "adapter", tmp_path / "cut")
    tensors = load_file(cut / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), cut / "adapter_model.safetensors")
    assert f"1 tensors exist in only one of them, first {next(iter(tensors))}" in message(cut)
    (cut / "adapter_config.json").write_text("{")
    assert "cannot be read" in message(cut)

    checkpoint(tiny_model, tmp_path / "step", lora=2)
    assert "run.json" in message_of_config(tmp_path / "step", tmp_path / "out")
    shutil.rmtree(tmp_path / "step/learner")
    checkpoint(tiny_model, tmp_path / "wider", lora=3)
    shutil.move(tmp_path / "wider/learner", tmp_path / "step/learner")
    assert "learner/digests.json has changed since it was written; use an earlier checkpoint" in message(
        tmp_path / "step"
    )
    seal(tmp_path / "step")
    text = message(tmp_path / "step")
    assert "has no base_model.model." in text and "of shape [3, " in text


def message_of_config(directory: Path, output: Path) -> str:
    """Of a checkpoint whose configuration has a knob that is no longer there."""
    path = directory / "run.json"
    whole = json.loads(path.read_text())
    former = {**whole, "config": {**whole["config"], "model": {**whole["config"]["model"], "freeze_vision": True}}}
    path.write_text(json.dumps(former))
    seal(directory)
    with pytest.raises(ConfigError) as caught:
        merge(directory, output)
    path.write_text(json.dumps(whole))
    seal(directory)
    return str(caught.value)


def test_the_command(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    result = CliRunner().invoke(cli.app, ["merge", str(saved / "adapter"), str(tmp_path / "merged")])
    assert result.exit_code == 0 and "model saved in" in result.output
    assert "image tokens" not in result.output
    assert_same_weights(tmp_path / "merged", saved)
    monkeypatch.setattr(sys, "argv", ["saccade", "merge", str(tmp_path / "none"), str(tmp_path / "second")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "no such folder" in capsys.readouterr().err
