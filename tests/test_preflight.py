"""What is checked before anything starts, beyond the configuration itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from driver.config import ConfigError, RunConfig, parse_config
from driver.errors import RunError
from driver.preflight import preflight
from driver.shapes import make_shapes
from driver.wiring import transfer_backend, weight_transfer_options
from tests.data_helpers import write_rows
from vlm.adapter import AdapterError
from vlm.registry import load_adapter
from vlm.tiny import build_tiny


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, seed=0, train_rounds=1, unseen_rounds=1)
    return {
        "steps": 4,
        "model": {"path": str(tiny_model)},
        "data": {"train": [str(folder / "train.parquet")], "max_prompt_length": 256},
        "rollout": {"max_completion_length": 12},
        "learner": {"prompts_per_step": 4},
    }


def test_a_run_that_ended_before_its_first_step_is_in_nobodys_way(settings: dict, tmp_path: Path) -> None:
    config = parse_config({**settings, "output_dir": str(tmp_path)})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "evaluation", "step": 0, "results": {}}) + "\n")
    preflight(config)


def test_figures_without_a_checkpoint_and_checkpoints_are_not_written_over(settings: dict, tmp_path: Path) -> None:
    config = parse_config({**settings, "output_dir": str(tmp_path)})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    with pytest.raises(ConfigError, match="left no checkpoint; delete it"):
        preflight(config)
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="continue it with --resume"):
        preflight(config)
    preflight(config, resume=True)


def test_it_says_what_of_the_media_is_computed_once(settings: dict, tmp_path: Path) -> None:
    def said(**model: object) -> list[str]:
        config = parse_config({**settings, "model": {**settings["model"], **model}, "output_dir": str(tmp_path)})
        return [line for line in preflight(config).lines if line.startswith("learner: image")]

    assert said() == said(freeze=["projector"]) == []
    held = "as far as 1 GiB a rank hold what it gives"
    (features,) = said(freeze=["vision", "projector"])
    assert features == f"learner: image: features are computed once per run for each distinct item, {held}"
    (tower,) = said(freeze=["vision"])
    runs = f"the frozen tower runs once per run for each distinct item, {held}; its projector in every pass"
    assert tower == f"learner: image: {runs}"
    assert said(lora_rank=2) == [features]


def test_a_reward_that_compares_with_answers_needs_their_column(settings: dict, tmp_path: Path) -> None:
    def problems(**change: object) -> str:
        path = write_rows(tmp_path / "a.parquet", [{"problem": f"{n}", "gold": n} for n in range(4)])
        data = {**settings["data"], "train": [str(path)]}
        config = parse_config({**settings, "data": data, "output_dir": str(tmp_path / "run"), **change})
        with pytest.raises(ConfigError) as caught:
            preflight(config)
        return str(caught.value)

    text = problems()
    assert "data.train: the reward 'accuracy' compares with answers, and no column is known to hold them" in text
    assert "Not used are: gold" in text
    assert "compares with answers" not in problems(reward={"functions": [{"name": "format"}, {"name": "no_such"}]})


def test_parts_and_roles_that_the_family_does_not_have_are_refused_by_name(settings: dict, tmp_path: Path) -> None:
    def problems(**model: object) -> str:
        config = parse_config(
            {**settings, "model": {**settings["model"], **model}, "output_dir": str(tmp_path / "out")}
        )
        with pytest.raises(ConfigError) as caught:
            preflight(config)
        return str(caught.value)

    assert "model.freeze: QwenVLAdapter has no audio; it has language, vision, projector" in problems(freeze=["audio"])
    assert "model.nothing would" not in problems(freeze=["audio"])
    assert "model.lora_targets: QwenVLAdapter has no audio; there are language.attention, language.mlp, vision, " in (
        problems(lora_rank=4, lora_targets=["audio"])
    )
    everything = {"freeze": ["vision", "projector", "language"]}
    assert "model.freeze or lora_targets: nothing would be trained: frozen: vision, projector, language" in problems(
        **everything
    )
    both = problems(**everything, path=str(build_tiny("llama", tmp_path / "llama")))
    assert "model.freeze: TextAdapter has no vision and no projector; it has language" in both
    write_rows(tmp_path / "text.jsonl", [{"prompt": f"{i}?", "answer": "x"} for i in range(8)])
    text = {**settings["data"], "train": [str(tmp_path / "text.jsonl")]}
    config = parse_config(
        {
            **settings,
            "data": text,
            "model": {**settings["model"], "freeze": ["language"]},
            "output_dir": str(tmp_path / "out"),
        }
    )
    with pytest.raises(ConfigError, match="nothing would be trained: frozen: language; media of the data: none"):
        preflight(config)


def test_quantization_without_its_package_is_refused(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {**settings["model"], "lora_rank": 4, "quantize": "nf4"}
    config = parse_config({**settings, "model": model, "output_dir": str(tmp_path / "out")})
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    with pytest.raises(ConfigError, match="quantize=nf4 needs bitsandbytes: pip install"):
        preflight(config)


def test_nccl_is_refused_where_the_cluster_turns_out_to_have_no_gpu(settings: dict) -> None:
    config = parse_config({**settings, "output_dir": "x", "weight_sync": {"backend": "nccl"}})
    with pytest.raises(RunError, match="nccl needs GPUs"):
        transfer_backend(config, "cpu")
    assert transfer_backend(config, "cuda") == "nccl"


def test_a_family_whose_engine_would_go_on_with_old_weights_is_refused_there(settings: dict, tmp_path: Path) -> None:
    def config(family: str) -> RunConfig:
        model = {"path": str(build_tiny(family, tmp_path / family))}
        return parse_config({**settings, "model": model, "output_dir": str(tmp_path)})

    with pytest.raises(RunError, match=r"AriaAdapter.* is not trained on cpu: .*former experts"):
        weight_transfer_options(config("aria"), "cpu")
    with pytest.raises(RunError, match=r"is not trained on cuda: .*see each other"):
        weight_transfer_options(config("gemma3"), "cuda")
    assert weight_transfer_options(config("gemma3"), "cpu").backend == "gloo"


def test_a_model_without_tokenizer_is_said_to_be_unusable(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(AdapterError, match="no usable tokenizer or processor at"):
        load_adapter(str(tmp_path))


def test_limits_of_a_micro_batch_that_hold_no_sample_are_said(settings: dict, tmp_path: Path) -> None:
    def problems(**limits: object) -> str:
        learner = {**settings["learner"], "logprob_chunk_rows": 64, **limits}
        config = parse_config({**settings, "learner": learner, "output_dir": str(tmp_path / "run")})
        with pytest.raises(ConfigError) as caught:
            preflight(config)
        return str(caught.value)

    assert "micro_batch_patches=1023 may not hold one prompt" in problems(micro_batch_patches=1023)  # 256 tokens x 4
    assert "leaves nothing for tokens" in problems(micro_batch_gib=0.01, logprob_chunk_rows=10_000)
    assert "micro_batch_gib=0.001 cannot hold one sample of up to" in problems(micro_batch_gib=0.001)
    enough = {**settings["learner"], "micro_batch_gib": 1.0, "micro_batch_patches": 1024}
    preflight(parse_config({**settings, "learner": enough, "output_dir": str(tmp_path / "run")}))
