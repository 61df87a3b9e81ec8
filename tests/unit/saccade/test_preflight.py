"""What is checked before anything starts, beyond the configuration itself."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rollout.data import rows
from rollout.data.formats import RowFile
from saccade.checks.machine import missing_weights
from saccade.commands.check_data import check_data
from saccade.commands.plan import make_plan
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import require_trainable, sampling_params, transfer_backend
from saccade.config.run_config import RunConfig
from saccade.demo.shapes import make_shapes
from saccade.errors import RunError
from saccade.preflight import idle_ranks, resolve
from saccade.run import Run
from tests.helpers.data_helpers import png, write_rows
from vlm.adapter import MultimodalAdapter
from vlm.errors import AdapterError
from vlm.families.registry import load_adapter
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
    resolve(config)


def test_figures_without_a_checkpoint_and_checkpoints_are_not_written_over(settings: dict, tmp_path: Path) -> None:
    config = parse_config({**settings, "output_dir": str(tmp_path)})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    with pytest.raises(ConfigError, match="without a checkpoint; start it again with --resume"):
        resolve(config)
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="continue it with --resume"):
        resolve(config)
    resolve(config, resume=True)


def test_it_says_what_of_the_media_is_computed_once(settings: dict, tmp_path: Path) -> None:
    def said(**model: object) -> list[str]:
        config = parse_config({**settings, "model": {**settings["model"], **model}, "output_dir": str(tmp_path)})
        return [line for line in resolve(config).lines if line.startswith("learner: image")]

    assert said() == said(freeze=["projector"]) == []
    limit = "(up to 1 GiB per rank)"
    (features,) = said(freeze=["vision", "projector"])
    assert features == f"learner: image: features are computed once per run and cached {limit}"
    (tower,) = said(freeze=["vision"])
    outputs = f"tower outputs are computed once per run and cached {limit}; the projector runs in every pass"
    assert tower == f"learner: image: {outputs}"
    assert said(lora=2) == [features]


def test_a_reward_that_compares_with_answers_needs_their_column(settings: dict, tmp_path: Path) -> None:
    def problems(**change: object) -> str:
        path = write_rows(tmp_path / "a.parquet", [{"problem": f"{n}", "gold": n} for n in range(4)])
        data = {**settings["data"], "train": [str(path)]}
        config = parse_config({**settings, "data": data, "output_dir": str(tmp_path / "run"), **change})
        with pytest.raises(ConfigError) as caught:
            resolve(config)
        return str(caught.value)

    text = problems()
    assert "data.train: the reward 'accuracy' compares with answers, but no column is known to hold them" in text
    assert "Unused columns: gold" in text
    assert "compares with answers" not in problems(reward={"functions": [{"name": "format"}, {"name": "no_such"}]})


def test_parts_and_roles_that_the_family_does_not_have_are_refused_by_name(settings: dict, tmp_path: Path) -> None:
    def problems(**model: object) -> str:
        config = parse_config(
            {**settings, "model": {**settings["model"], **model}, "output_dir": str(tmp_path / "out")}
        )
        with pytest.raises(ConfigError) as caught:
            resolve(config)
        return str(caught.value)

    assert "model.freeze: QwenVLAdapter has no audio; it has language, vision, projector" in problems(freeze=["audio"])
    assert "model.nothing would" not in problems(freeze=["audio"])
    assert "model.lora.targets: QwenVLAdapter has no audio; choose from language.attention, language.mlp, vision, " in (
        problems(lora={"targets": ["audio"]})
    )
    everything = {"freeze": ["vision", "projector", "language"]}
    assert "model.freeze or lora.targets: nothing would be trained: frozen: vision, projector, language" in problems(
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
        resolve(config)


def test_ranks_that_have_nothing_to_train_are_said(settings: dict, tmp_path: Path) -> None:
    """A group is trained by one rank: 8 prompts in 2 steps are work for 4."""

    def said(ranks: int, **algorithm: int) -> list[str]:
        learner = {**settings.get("learner", {}), "ranks": ranks, "prompts_per_step": 8}
        return idle_ranks(
            parse_config(settings | {"output_dir": str(tmp_path), "learner": learner, "algorithm": algorithm})
        )

    assert said(8) == said(4, optimizer_steps=2) == []
    (line,) = said(9)
    assert line.startswith("learner: 1 of learner.ranks=9 have nothing to train")
    (line,) = said(8, optimizer_steps=2)
    assert "4 of learner.ranks=8" in line and "prompts_per_step=8 / algorithm.optimizer_steps=2" in line


def test_quantization_without_its_package_is_refused(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {**settings["model"], "lora": {"quantize": "nf4"}}
    config = parse_config({**settings, "model": model, "output_dir": str(tmp_path / "out")})
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    with pytest.raises(ConfigError, match="quantize=nf4 needs bitsandbytes: pip install"):
        resolve(config)


def test_weights_go_over_nccl_between_gpus_that_nobody_shares(settings: dict) -> None:
    half = {"cluster": {"resources": {"learner": {"GPU": 0.5}}}}
    alone, sharing = (parse_config({**settings, "output_dir": "x", **more}) for more in ({}, half))
    assert [transfer_backend(alone, device) for device in ("cuda", "cpu")] == ["nccl", "gloo"]
    assert transfer_backend(sharing, "cuda") == "gloo"


def test_a_family_whose_engine_would_go_on_with_old_weights_is_refused_there(settings: dict, tmp_path: Path) -> None:
    def config(family: str) -> RunConfig:
        model = {"path": str(build_tiny(family, tmp_path / family))}
        return parse_config({**settings, "model": model, "output_dir": str(tmp_path)})

    aria, gemma = config("aria"), config("gemma3")
    with pytest.raises(RunError, match=r"AriaAdapter.* is not trained on cpu: .*old experts"):
        require_trainable(aria, load_adapter(aria.model.path), "cpu")
    gemma_adapter = load_adapter(gemma.model.path)
    with pytest.raises(RunError, match=r"is not trained on cuda: .*see each other"):
        require_trainable(gemma, gemma_adapter, "cuda")
    require_trainable(gemma, gemma_adapter, "cpu")


def test_a_model_without_tokenizer_is_said_to_be_unusable(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(AdapterError, match="no usable tokenizer or processor at"):
        load_adapter(str(tmp_path))


def test_limits_of_a_micro_batch_that_hold_no_sample_are_said(settings: dict, tmp_path: Path) -> None:
    def problems(**limits: object) -> str:
        learner = {**settings["learner"], **limits}
        config = parse_config({**settings, "learner": learner, "output_dir": str(tmp_path / "run")})
        with pytest.raises(ConfigError) as caught:
            resolve(config)
        return str(caught.value)

    assert "; 0.001 GiB leave nothing for tokens" in problems(micro_batch="0.001 GiB")
    enough = {**settings["learner"], "micro_batch": "1 GiB"}
    resolve(parse_config({**settings, "learner": enough, "output_dir": str(tmp_path / "run")}))


def refused(settings: dict, folder: Path, rows: list[dict], **data: object) -> str:
    """What `resolve` says of these rows."""
    path = write_rows(folder / "rows.parquet", rows)
    given = {**settings["data"], "train": [str(path)], **data}
    config = parse_config({**settings, "data": given, "output_dir": str(folder / "out")})
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    return str(caught.value)


def lines(settings: dict, folder: Path, rows: list[dict], **data: object) -> tuple[str, ...]:
    given = {**settings["data"], "train": [str(write_rows(folder / "rows.parquet", rows))], **data}
    return resolve(parse_config({**settings, "data": given, "output_dir": str(folder / "out")})).lines


@pytest.mark.parametrize("column", ["picture", "image_path", "img"])
def test_images_in_a_column_that_no_role_is_for_are_not_left_out_silently(
    settings: dict, tmp_path: Path, column: str
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    values = {"picture": {"bytes": png(), "path": "x"}, "image_path": "a.png", "img": [png()]}
    rows = [{"prompt": f"{n}?", column: values[column], "answer": "x", "note": "see a.png"} for n in range(4)]
    text = refused(settings, tmp_path, rows)
    assert f"data.train: the column {column!r} holds images, but no role uses it: set data.columns: " in text
    assert f"{{image: {column}}}, or {{image: null}} to leave them out" in text and "note" not in text
    named = lines(settings, tmp_path, rows, columns={"image": column})
    assert f"data.train: 4 rows; prompt: prompt, image: {column}, answer: answer" in named
    assert not [line for line in lines(settings, tmp_path, rows, columns={"image": None}) if "WARNING" in line]


def test_each_problem_stands_behind_its_own_knob_and_once(settings: dict, tmp_path: Path) -> None:
    """A limit that the model cannot keep is no fault of its path, and refused answers are one fault, not two."""
    model = {"path": str(build_tiny("llama", tmp_path / "llama")), "max_image_tokens": 64}
    limited = {**settings, "model": model, "output_dir": str(tmp_path / "out")}
    for command in (resolve, make_plan, lambda config: check_data(config, None, Console(file=io.StringIO()))):
        with pytest.raises(ConfigError) as caught:
            command(parse_config(limited))
        (problem,) = caught.value.problems
        assert problem.startswith("model.max_image_tokens=64 cannot be kept: the model takes no images")

    rows = [{"prompt": f"{n}?", "answer": None if n % 2 else "x"} for n in range(20)]
    for share in (0.01, 1.0):  # of all, or of some rows
        given = rows if share < 1 else rows[1::2]
        text = refused(settings, tmp_path, given, columns={"image": None, "answer": "answer"}, max_refused_share=share)
        assert text.startswith("1 problem") and "the row has no answer" in text


def test_text_alone_for_a_model_that_sees_is_said_loudly(settings: dict, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": "x", "file": "a.png"} for n in range(4)]  # there is no such file
    (warning,) = [line for line in lines(settings, tmp_path, rows) if "WARNING" in line]
    assert "data.train has no column of images" in warning and "{image: null}" in warning
    out = io.StringIO()
    data = {**settings["data"], "train": [str(tmp_path / "rows.parquet")]}
    assert check_data(parse_config({**settings, "data": data, "output_dir": "x"}), None, Console(file=out, width=60))
    assert warning in out.getvalue()


def test_prompts_that_are_all_too_long_are_found_before_anything_starts(settings: dict, tmp_path: Path) -> None:
    rows = [{"prompt": "long " * 100, "answer": "x"} for _ in range(4)]
    text = refused(settings, tmp_path, rows, columns={"image": None})
    assert "data.train: more than 1.00% of the rows were refused (data.max_refused_share)" in text
    assert "prompt too long" in text and "the limit is 256 (data.max_prompt_length)" in text
    all_refused = refused(settings, tmp_path, rows, columns={"image": None}, max_refused_share=1.0)
    assert "data.train: none of the 4 rows can be used" in all_refused


def test_a_check_reads_everything_then_judges_and_says_nothing_twice(settings: dict, tmp_path: Path) -> None:
    rows = [{"prompt": "long " * (100 * (n % 2)) + f"{n}?", "answer": "x"} for n in range(10)]
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    path = write_rows(folder / "rows.parquet", rows)
    out = io.StringIO()
    data = {**settings["data"], "train": [str(path)], "columns": {"image": None}}
    config = parse_config({**settings, "data": data, "output_dir": "x"})
    assert not check_data(config, None, Console(file=out, width=60))
    said = out.getvalue().splitlines()
    assert len(set(said)) == len(said)
    assert sum(f"{path} row " in line for line in said) == 5
    assert "5 of 10 rows refused: 5 prompt too long" in said[1]
    assert said[-1] == "  a run would stop: more than 1.00% of the rows were refused (data.max_refused_share)"


def test_missing_model_data_and_rewards_are_named_at_once_and_in_their_words(settings: dict, tmp_path: Path) -> None:
    gone = {
        **settings,
        "model": {"path": "runs/mine/model"},
        "data": {**settings["data"], "train": ["gone.parquet"], "eval": ["away.json"]},
        "reward": {"functions": [{"name": "gone_rewards.py:digit"}]},
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(ConfigError) as caught:
        resolve(parse_config(gone))
    text = str(caught.value)
    for said in (
        "model.path: no usable model at 'runs/mine/model': there is no such folder",
        "data.train: 1 problem(s) with the data:\n  - gone.parquet: no such file",
        "away.json: no such file",
        "gone_rewards.py",
    ):
        assert said in text.replace("\n    ", "\n  "), said
    assert "Repo id" not in text and "qwen2_5_vl" not in text
    with pytest.raises(ConfigError, match=r"(?s)mine/model.*gone\.parquet: no such file.*away\.json: no such file"):
        check_data(parse_config(gone), None, Console(file=io.StringIO()))


def test_a_model_that_is_neither_a_folder_nor_on_the_hub_is_said_to_be_no_folder() -> None:
    with pytest.raises(
        AdapterError, match="no usable model at 'runs/model': there is no such folder, and loading it from the Hugging"
    ):
        load_adapter("runs/model")


def test_nothing_is_saved_of_a_run_that_trained_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.run.explain", lambda error, asked, head: error)
    monkeypatch.setattr(Run, "checkpoint", lambda self: pytest.fail("a checkpoint of step 0 blocks the folder"))
    run = object.__new__(Run)
    run.config = SimpleNamespace(learner=SimpleNamespace(ranks=1, zero_stage=0))  # type: ignore[assignment]
    run.actors, run.head = SimpleNamespace(questions=dict), None  # type: ignore[assignment]
    error = RunError("no usable row")
    assert asyncio.run(run.checkpoint_after(error)) is error


def test_a_folder_without_all_its_weights_and_a_port_in_use_are_said(settings: dict, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(settings["model"]["path"], model)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    given = {**settings, "output_dir": str(tmp_path / "run"), "model": {"path": str(model)}}
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            resolve(parse_config({**given, "cluster": {"metrics_port": port}}))
    assert f"cluster.metrics_port={port} cannot be used on this machine" in str(caught.value)
    assert f"{model} has no weights: neither model.safetensors nor model.safetensors.index.json" in str(caught.value)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    config = parse_config({**given, "model": {"path": str(model)}})
    assert missing_weights(config) == [
        f"model.path: 1 of 2 weight files are missing in {model}: model-00002-of-00002.safetensors"
    ]
    (model / "model-00002-of-00002.safetensors").touch()
    hub = parse_config({**given, "model": {"path": "Qwen/Qwen2.5-VL-3B-Instruct"}})
    assert missing_weights(config) == missing_weights(hub) == []


def test_the_model_is_loaded_once_and_each_set_opened_once(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {**settings["data"], "eval": settings["data"]["train"]}
    config = parse_config({**settings, "data": data, "output_dir": str(tmp_path / "out")})
    loaded, opened = [], []

    def load(*arguments: Any, **options: Any) -> MultimodalAdapter:
        loaded.append(arguments)
        return load_adapter(*arguments, **options)

    def open_files(patterns: Sequence[str], problems: list[str]) -> list[RowFile]:
        opened.append(patterns)
        return rows.open_files(patterns, problems)

    monkeypatch.setattr("saccade.config.options.load_adapter", load)
    monkeypatch.setattr("rollout.data.source.open_files", open_files)
    resolved = resolve(config)
    assert len(loaded) == 1 and len(opened) == 2
    assert resolved.media_kinds == ("image",)
    assert sampling_params(config, resolved.adapter).stop_token_ids == resolved.adapter.stop_token_ids


def test_problems_of_every_kind_are_reported_together(settings: dict, tmp_path: Path) -> None:
    """The output folder, the learner, the rows and the rewards, each looked at by a check of its own."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    path = write_rows(tmp_path / "a.parquet", [{"prompt": f"{n}?", "answer": "x"} for n in range(2)])
    data = {"train": [str(path)], "columns": {"image": None}, "max_prompt_length": 10**6}
    given = {**settings, "data": {**settings["data"], **data}}
    given |= {"reward": {"functions": [{"name": "gone.py:reward"}]}, "output_dir": str(tmp_path)}
    learner = {**settings["learner"], "micro_batch": 10**7}
    with pytest.raises(ConfigError) as caught:
        resolve(parse_config({**given, "learner": learner}))
    parts = ("output_dir: ", "data.max_prompt_length + ", "data.train has 2 rows", "reward.functions: ")
    assert [sum(problem.startswith(part) for problem in caught.value.problems) for part in parts] == [1, 1, 1, 1]
