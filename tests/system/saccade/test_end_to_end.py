"""The whole system for real: vLLM, DeepSpeed, Ray, weight transfer over gloo, on a tiny model and shapes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from learner.durable import seal
from rollout.data.source import PromptSource
from saccade.commands.merge import merge
from saccade.config.load import parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import config_adapter, data_options
from saccade.demo.shapes import make_shapes
from saccade.loop import evaluate, train
from saccade.observe.metrics import read_metrics
from vlm.tiny import build_tiny
from vlm.tiny.noise import noise

SPOILED = 9
"""Of 16 rows one that the seed of `settings` puts into the second step."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    make_shapes(directory, seed=0, train_rounds=1, unseen_rounds=1)
    return directory


@pytest.fixture(scope="module")
def settings(tiny_model, shapes) -> dict:
    """Four groups of four a step, on random weights: what matters is the plumbing."""
    return {
        "steps": 4,
        "seed": 3,
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {
            "train": [str(shapes / "train.parquet")],
            "eval": [str(shapes / "unseen.parquet")],
            "columns": {"group": "kind"},
            "max_prompt_length": 256,
        },
        "rollout": {
            "num_generations": 4,
            "max_completion_length": 12,
            "max_staleness": 0,
            "kv_cache_gib": 0.25,
            "engine_options": {"max_num_seqs": 32},
        },
        # Random weights never give the expected answer; the length of the text does vary.
        "reward": {"functions": [{"name": "tests.helpers.rewards_for_tests:letters"}]},
        "algorithm": {"kl": 0.1},
        "learner": {
            "prompts_per_step": 4,
            "learning_rate": 1e-3,
            "zero_stage": 1,
            "lr_schedule": "linear",
            "warmup_steps": 1,
        },
        "evaluation": {"max_prompts": 8},
        "cluster": {"device": "cpu"},
    }


def weights(directory: Path) -> dict:
    return load_file(directory / "model.safetensors")


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(settings, tmp_path, local_ray):
    whole = train(
        parse_config({**settings, "output_dir": str(tmp_path / "whole"), "checkpoint": {"every": 2, "keep": 9}})
    )
    steps = read_metrics(tmp_path / "whole")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step["staleness"] == 0
        assert step["samples"] == 16
        assert step["learner"]["mismatch_max"] < 1e-4  # engine and learner agree on every sampled token
        assert step["seconds"]["total"] == pytest.approx(
            sum(v for k, v in step["seconds"].items() if k != "total"), rel=1e-6
        )
    assert set(whole.evaluations) == {0, 4}
    assert set(whole.evaluations[4]["unseen"]) <= {"color", "shape", "count"}
    state = json.loads((tmp_path / "whole/checkpoints/step-000002/run.json").read_text())
    assert state["ledger"]["outstanding"] == []
    assert state["ledger"]["trained"] == 8

    # A run that lost everything after step 2 but its checkpoint. It was inside batch 2 when that was written: the
    # prompts were handed out, nothing of them was trained, and step 3 is in its metrics.
    resumed_dir = tmp_path / "resumed"
    saved = resumed_dir / "checkpoints/step-000002"
    shutil.copytree(tmp_path / "whole/checkpoints/step-000002", saved)
    config = parse_config({**settings, "output_dir": str(resumed_dir)})
    source = PromptSource(data_options(config, config.data.train), config_adapter(config))
    source.load_state(state["cursor"])
    state["ledger"]["outstanding"] = [
        {"batch": 2, "late": False, "ref": asdict(prompt.ref)} for prompt in source.take(4)
    ]
    state["cursor"] = source.state()
    (saved / "run.json").write_text(json.dumps(state))
    seal(saved)
    (resumed_dir / "metrics.jsonl").write_text("".join(json.dumps({"kind": "step", **s}) + "\n" for s in steps[:3]))
    resumed = train(config, resume=True)
    assert [s["step"] for s in read_metrics(resumed_dir)] == [1, 2, 3, 4]
    assert whole.model_dir is not None
    assert resumed.model_dir is not None
    expected, actual = weights(whole.model_dir), weights(resumed.model_dir)
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not expected[name].equal(actual[name])]
    assert different == []


@pytest.mark.slow
def test_a_run_that_goes_on_before_or_behind_a_step_that_was_not_taken_ends_as_the_undisturbed_one(
    settings, tmp_path, local_ray
):
    rows = [{"prompt": f"what is {i}?", "answer": "a", "spoiled": i == SPOILED} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        **settings,
        "data": {"train": [str(tmp_path / "rows.jsonl")], "max_prompt_length": 64},
        "reward": {"functions": [{"name": "tests.helpers.rewards_for_tests:letters_or_too_much"}]},
        "algorithm": {"name": "dr_grpo"},
        "evaluation": {},
        "checkpoint": {"every": 1, "keep": 9},
    }
    train(parse_config({**given, "output_dir": str(tmp_path / "whole")}))
    steps = read_metrics(tmp_path / "whole")
    assert [s["steps_not_taken"] for s in steps] == [0, 1, 0, 0]
    for step in (1, 2):
        directory, saved = tmp_path / f"from-{step}", f"checkpoints/step-{step:06d}"
        shutil.copytree(tmp_path / "whole" / saved, directory / saved)
        train(parse_config({**given, "output_dir": str(directory)}), resume=True)
        for ours, theirs in zip(read_metrics(directory), steps[step:], strict=True):
            assert timeless(ours) == timeless(theirs)
        last = "checkpoints/step-000004/learner"
        for path in (tmp_path / "whole" / last).iterdir():
            assert (directory / last / path.name).read_bytes() == path.read_bytes(), path.name


def timeless(record: dict) -> dict:
    """A step's record without what a clock said."""
    return {name: value for name, value in record.items() if name not in ("seconds", "busy", "reward_seconds")}


@pytest.mark.slow
def test_lora_trains_adapters_and_the_engine_samples_from_the_merged_model(settings, tiny_model, tmp_path, local_ray):
    result = train(
        parse_config(
            {
                **settings,
                "output_dir": str(tmp_path / "lora"),
                "steps": 3,
                "model": {**settings["model"], "lora": {"rank": 4, "targets": ["language.mlp", "vision"]}},
                "learner": {**settings["learner"], "learning_rate": 0.05},
            }
        )
    )
    steps = read_metrics(result.output_dir)
    assert all(s["grad_norm"] > 0 for s in steps)
    assert all(s["learner"]["mismatch_max"] < 1e-4 for s in steps)  # also after updates, merged and sent
    assert steps[0]["learner"]["kl"] == pytest.approx(0.0, abs=1e-9)  # the reference is the model without adapters
    assert steps[-1]["learner"]["kl"] > 1e-6
    assert result.model_dir is not None
    before, after = weights(tiny_model), weights(result.model_dir)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    adapted = {name for name in changed if re.search(r"model\.layers.*\.mlp\.|visual\.blocks\.", name)}
    assert changed == adapted and any("visual" in name for name in changed)


@pytest.mark.slow
def test_qlora_engines_sample_from_the_rounded_base_from_the_first_token_on(settings, tiny_model, tmp_path, local_ray):
    pytest.importorskip("bitsandbytes")
    result = train(
        parse_config(
            {
                **settings,
                "output_dir": str(tmp_path / "qlora"),
                "steps": 2,
                "model": {**settings["model"], "lora": {"rank": 4, "quantize": "nf4"}},
                "learner": {**settings["learner"], "ranks": 2, "zero_stage": 2, "learning_rate": 0.05},
            }
        )
    )
    steps = read_metrics(result.output_dir)
    assert [s["step"] for s in steps] == [1, 2] and all(s["grad_norm"] > 0 for s in steps)
    assert all(s["learner"]["mismatch_max"] < 1e-4 for s in steps)  # not 1e-2, as with what the engine loaded
    assert steps[0]["learner"]["kl"] == pytest.approx(0.0, abs=1e-9) and steps[1]["learner"]["kl"] > 1e-6
    assert result.model_dir is not None
    before, after = weights(tiny_model), weights(result.model_dir)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    # The saved model is what the engines were left with.
    again = evaluate(
        parse_config({**settings, "output_dir": "unused", "model": {"path": str(result.model_dir), "dtype": "float32"}})
    )
    assert again == result.evaluations[2]

    # Its last checkpoint merges into the same model.
    merge(result.output_dir / "checkpoints/step-000002", tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert merged.keys() == after.keys() and all(merged[name].equal(after[name]) for name in after)


@pytest.mark.slow
def test_videos_sounds_images_and_text_train_together(settings, tmp_path, local_ray):
    """Two ranks under ZeRO-3 with whatever the batches bring them; the engine still samples from what is trained."""
    model = build_tiny("qwen2_5_omni", tmp_path / "model")
    rows = []
    for i in range(4):
        for kind, suffix in (("image", "png"), ("video", "mp4"), ("audio", "wav")):
            (tmp_path / f"{i}.{suffix}").write_bytes(noise(kind, i).data)
            rows.append({"prompt": f"<{kind}> what is it?", kind: f"{i}.{suffix}", "answer": "a"})
        rows.append({"prompt": "how many?", "answer": "b"})
        rows.append({"prompt": "<video> with <image>?", "video": f"{i}.mp4", "image": f"{i}.png", "answer": "c"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        parse_config(
            {
                **settings,
                "output_dir": str(tmp_path / "run"),
                "steps": 3,
                "model": {"path": str(model), "dtype": "float32"},
                "data": {"train": [str(tmp_path / "rows.jsonl")], "max_prompt_length": 512},
                "learner": {**settings["learner"], "ranks": 2, "zero_stage": 3, "prompts_per_step": 5},
                "evaluation": {},
            }
        )
    )
    steps = read_metrics(result.output_dir)
    assert len(steps) == 3 and all(s["grad_norm"] > 0 for s in steps)
    assert all(s["learner"]["mismatch_max"] < 1e-4 for s in steps)
    assert all(s["samples"] == 20 for s in steps)
    assert result.model_dir is not None
    before, after = weights(model), weights(result.model_dir)
    assert before.keys() == after.keys() and all(name.startswith("thinker.") for name in after)
    for part in ("visual", "audio_tower", "model"):
        assert any(not before[n].equal(after[n]) for n in after if n.startswith(f"thinker.{part}.")), part
    assert json.loads((result.model_dir / "config.json").read_text())["model_type"] == "qwen2_5_omni"


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_no_process(settings, tmp_path, repository):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "steps": 10_000, "output_dir": str(tmp_path / "run")}))
    marker = f"saccade-test-{os.getpid()}"
    environment = {**os.environ, "SACCADE_TEST_MARKER": marker}
    command = [sys.executable, "-m", "saccade", "train", str(path)]
    with subprocess.Popen(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, "".join(output)
    text = "".join(output)
    assert "stopping: the state is saved first" in text
    assert "--resume" in text
    saved = list((tmp_path / "run/checkpoints").iterdir())
    assert len(saved) == 1
    assert (saved[0] / "run.json").exists()
    assert not [p for p in psutil.process_iter() if _carries(p, marker)]


def test_a_run_that_cannot_start_says_all_that_is_wrong_and_starts_nothing(settings, tmp_path):
    wrong = {
        **settings,
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "nowhere")},
        "reward": {"functions": [{"name": "acuracy"}]},
    }
    with pytest.raises(ConfigError) as caught:
        train(parse_config(wrong))
    assert "no usable model at" in str(caught.value)
    assert "did you mean 'accuracy'" in str(caught.value)
    assert not (tmp_path / "run").exists()


def _carries(process: psutil.Process, marker: str) -> bool:
    """Whether the process inherited the marker, hence belongs to the run."""
    try:
        return process.environ().get("SACCADE_TEST_MARKER") == marker
    except psutil.Error:
        return False
