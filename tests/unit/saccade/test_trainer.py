"""saccade.Trainer: the same configuration as YAML would give, from functions, rows and other libraries' settings."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import saccade
import saccade.loop
from learner.config import Cispo, Kl, PpoClip, Sapo
from rewards.base import ScoringRequest
from rewards.registry import load_reward
from saccade.config.load import config_tree, parse_config
from saccade.trainer.trainer import Trainer
from tests.helpers import rewards_for_tests

FILE = rewards_for_tests.__file__
MODEL = "a/model"
BASE = {"output_dir": "runs/x", "steps": 3}


def yaml_run(tree: Mapping[str, Any]) -> saccade.RunConfig:
    return parse_config({**BASE, "model": {"path": MODEL}, "data": {"train": ["x.parquet"]}, **tree})


def problems_of(**arguments: Any) -> tuple[str, ...]:
    with pytest.raises(saccade.ConfigError) as caught:
        Trainer(**{"model": MODEL, "train_dataset": "x.parquet", "args": BASE, **arguments})
    return caught.value.problems


# --- settings ---------------------------------------------------------------------------------------------------------


def test_it_is_the_run_that_yaml_describes() -> None:
    args = {**BASE, "learner": {"learning_rate": 1e-5, "ranks": 2}, "rollout.num_generations": 4, "algorithm": "dapo"}
    trainer = Trainer(MODEL, ["accuracy", f"{FILE}:letters"], args, "x.parquet", ["y.parquet"], adapter="mine.py:Mine")
    assert trainer.config == parse_config(
        {
            **BASE,
            "model": {"path": MODEL, "adapter": "mine.py:Mine"},
            "data": {"train": ["x.parquet"], "eval": ["y.parquet"]},
            "reward": {"functions": ["accuracy", f"{FILE}:letters"]},
            "learner": {"learning_rate": 1e-5, "ranks": 2},
            "rollout": {"num_generations": 4},
            "algorithm": {"name": "dapo"},
        }
    )


def test_a_configuration_is_taken_with_changes_behind_it() -> None:
    config = yaml_run({"rollout": {"num_generations": 4}})
    trainer = Trainer(args=[config, {"learner.learning_rate": 1e-3}], reward_funcs="format")
    expected = {"rollout": {"num_generations": 4}, "learner": {"learning_rate": 1e-3}}
    assert trainer.config == yaml_run({**expected, "reward": {"functions": ["format"]}})
    assert Trainer(args=config).config == config


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = problems_of(
        model=object(),
        reward_funcs=[lambda completions: [0.0], 3],
        args=[{"learner": {"rnks": 2}}, 7],
        train_dataset=iter(()),
        peft_config={"r": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    )
    starts = ["args: int is not a RunConfig", "reward_funcs[1]: 3 is not a function", "model: object: give a folder"]
    starts += ["train_dataset: tuple_iterator", "peft_config.target_modules=['q_proj']", "peft_config.lora_dropout=0.1"]
    starts += ["output_dir: required", "steps: required", "learner.rnks: unknown key; did you mean learner.ranks?"]
    assert all(any(text.startswith(start) for text in found) for start in starts), found


def test_lora_is_taken_from_peft() -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["vision", "language.mlp"], task_type="CAUSAL_LM")
    config = Trainer(MODEL, "format", BASE, "x.parquet", peft_config=given).config
    targets = ["language.mlp", "vision"]
    assert (
        config.model == yaml_run({"model": {"path": MODEL, "lora": {"rank": 4, "alpha": 16, "targets": targets}}}).model
    )
    refused = peft.LoraConfig(r=4, target_modules=["vision"], use_dora=True, lora_dropout=0.1)
    assert len(problems_of(peft_config=refused)) == 2


# --- TRL --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class GRPOConfig:
    """Some fields of TRL's, at its defaults."""

    output_dir: str | None = None
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_generations: int = 8
    max_completion_length: int = 512
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    temperature: float = 1.0
    top_p: float = 1.0
    bf16: bool | None = None
    use_vllm: bool = False
    logging_steps: float = 10
    reward_weights: list[float] | None = None
    seed: int = 42
    neftune_noise_alpha: float | None = None
    dataloader_num_workers: int = 0


TRL_DEFAULTS = {
    "seed": 42,
    "rollout": {"num_generations": 8, "max_completion_length": 512, "max_staleness": 0},
    "algorithm": {"advantage": "grpo", "loss": "ppo_clip", "aggregation": "token"},
    "learner": {"learning_rate": 1e-6, "lr_schedule": "linear", "prompts_per_step": 1},
    "checkpoint": {"every": 500},
}


def test_an_object_of_trl_means_what_it_means_there() -> None:
    given = GRPOConfig(output_dir="runs/x", max_steps=3, logging_steps=1, use_vllm=True, epsilon_high=0.3)
    assert Trainer(MODEL, "format", given, "x.parquet").config == yaml_run(
        {**TRL_DEFAULTS, "reward": {"functions": ["format"]}}
    )
    some = SimpleNamespace(output_dir="runs/x", max_steps=3)
    assert Trainer(MODEL, "format", some, "x.parquet").config == Trainer(MODEL, "format", given, "x.parquet").config


def test_fields_of_trl_become_knobs() -> None:
    given = GRPOConfig(
        output_dir="runs/x",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        warmup_steps=0.1,
        beta=0.1,
        loss_type="dr_grpo",
        scale_rewards="none",
        bf16=False,
        reward_weights=[0.5, 2],
    )
    rows = [{"prompt": "p", "answer": "a"}] * 40
    config = Trainer(MODEL, ["format", "accuracy"], [given, {"learner.ranks": 2}], rows).config
    assert config.steps == 20, "two epochs of 40 rows, 4 prompts a step: 4 x 2 x 2 ranks / 4 siblings"
    assert (config.learner.prompts_per_step, config.learner.ranks, config.learner.warmup_steps) == (4, 2, 2)
    assert config.model.dtype == "float32"
    assert (config.algorithm.advantage, config.algorithm.aggregation) == ("dr_grpo", "constant")
    assert config.algorithm.kl == Kl(0.1, estimator="k2")
    assert [spec.weight for spec in config.reward.functions] == [0.5, 2]


def test_clips_of_trl_are_carried_over_where_ratios_vary() -> None:
    def loss_of(later: dict[str, Any], **fields: Any) -> Any:
        given = SimpleNamespace(output_dir="runs/x", max_steps=3, **fields)
        return Trainer(MODEL, "format", [given, later], "x.parquet").config.algorithm.loss

    stale: dict[str, Any] = {"rollout.max_staleness": 1}
    assert loss_of(stale, epsilon=0.1) == PpoClip(low=0.1, high=0.1)
    assert loss_of(
        {"algorithm": {"optimizer_steps": 2}, "learner.prompts_per_step": 2}, epsilon_high=0.3, delta=2.0
    ) == PpoClip(high=0.3, dual=2.0)
    assert loss_of(stale, loss_type="cispo", epsilon_high=5.0) == Cispo(low=1.0, high=4.0)
    assert loss_of(stale, loss_type="sapo") == Sapo()
    assert loss_of({}, epsilon=0.1) == PpoClip(), "ratios are 1"
    given = SimpleNamespace(output_dir="runs/x", max_steps=3, beta=0.1)
    (problem,) = problems_of(args=[given, stale], reward_funcs="format")
    assert problem.startswith("args.use_bias_correction_kl=True")
    exact = SimpleNamespace(output_dir="runs/x", max_steps=3, beta=0.1, use_bias_correction_kl=False)
    assert Trainer(MODEL, "format", [exact, stale], "x.parquet").config.algorithm.kl == Kl(0.1)


def test_fields_of_trl_without_a_counterpart_are_errors_all_at_once() -> None:
    given = GRPOConfig(
        loss_type="luspo",
        scale_rewards="batch",
        lr_scheduler_type="polynomial",
        top_p=0.9,
        neftune_noise_alpha=5.0,
        dataloader_num_workers=4,
        num_generations=3,
        reward_weights=[1.0, 2.0],
    )
    found = problems_of(args=given, reward_funcs="format")
    names = ["loss_type='luspo'", "scale_rewards='batch'", "lr_scheduler_type='polynomial'", "top_p=0.9"]
    names += ["neftune_noise_alpha=5.0", "dataloader_num_workers=4", "per_device_train_batch_size=8", "reward_weights"]
    names += ["num_train_epochs=3.0"]
    assert all(any(text.startswith(f"args.{name}") for text in found) for name in names), found


def test_the_real_configuration_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl.trainer.grpo_config")
    given = trl.GRPOConfig(str(tmp_path), max_steps=3, use_cpu=True, bf16=False, num_generations=4)
    config = Trainer(MODEL, "format", given, "x.parquet").config
    assert (config.learner.prompts_per_step, config.cluster.device, config.model.dtype) == (2, "cpu", "float32")
    refused = trl.GRPOConfig(str(tmp_path), max_steps=3, use_cpu=True, top_entropy_quantile=0.5, num_iterations=2)
    assert sorted(text.partition("=")[0] for text in problems_of(args=refused)) == [
        "args.num_iterations",
        "args.top_entropy_quantile",
    ]
    from saccade.trainer.trl import DEFAULTS

    declared = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    assert {k: v for k, v in DEFAULTS.items() if getattr(declared[k], "value", declared[k]) != v} == {
        "output_dir": "trainer_output"
    }


EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/api.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["functions", "trl", "file"])
def test_the_examples_of_the_documentation_start_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the run itself; tests/system/saccade/test_trainer.py trains the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOConfig=GRPOConfig))
    monkeypatch.setitem(sys.modules, "my_rewards", rewards_for_tests)
    (tmp_path / "mine.yaml").write_text(json.dumps({**BASE, "model": {"path": MODEL}, "data": {"train": ["x.jsonl"]}}))
    started: list[saccade.RunConfig] = []
    result = SimpleNamespace(model_dir="m", steps=3)
    monkeypatch.setattr(saccade.loop, "train", lambda config, **_: started.append(config) or result)
    monkeypatch.setattr(saccade.loop, "evaluate", lambda config, **_: {})
    exec(compile(code, "docs/api.md", "exec"), {"__name__": "__main__"})
    assert len(started) == 1


# --- rows -------------------------------------------------------------------------------------------------------------


def given_files(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a run finds when it starts."""
    started: list[saccade.RunConfig] = []
    monkeypatch.setattr(saccade.loop, "train", lambda config, **_: started.append(config))
    trainer.train()
    assert started == [trainer.config]
    return Path(trainer.config.output_dir) / "given"


def test_rows_with_images_and_conversations_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    (tmp_path / "there.png").write_bytes(b"\x89PNG")
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "images": [image], "level": np.int64(2)},
        {
            "prompt": [{"role": "system", "content": "look"}, {"role": "user", "content": parts}],
            "images": [str(tmp_path / "there.png")],
            "level": None,
        },
    ]
    args = {**BASE, "output_dir": str(tmp_path / "run")}
    trainer = Trainer(MODEL, "format", args, rows, {"a": rows[:1], "b": "y.parquet"})
    folder = given_files(trainer, monkeypatch)
    assert trainer.config.data.train == (str(folder / "train.parquet"),)
    assert trainer.config.data.eval == (str(folder / "eval-a.parquet"), "y.parquet")
    first, second = pq.read_table(folder / "train.parquet").to_pylist()
    decoded = Image.open(pa.BufferReader(first["images"][0]["bytes"]))
    assert np.array_equal(np.asarray(decoded), np.asarray(image))
    assert second["images"][0]["bytes"] == b"\x89PNG"
    assert (first["level"], second["level"]) == (2, None)
    assert second["prompt"][0]["content"] == [{"type": "text", "text": "look"}]


class Dataset:
    """As far as `datasets.Dataset` is used: a table behind an order of rows, with images as they are stored."""

    def __init__(self, table: pa.Table, order: list[int]) -> None:
        self.table, self.order, self.column_names, self.format = table, order, table.column_names, None

    def with_format(self, name: str) -> Dataset:
        assert name == "arrow"
        return self

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice) -> pa.Table:
        return self.table.take(self.order[rows])


def test_a_data_set_is_stored_as_it_is_ordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.png").write_bytes(b"b")
    images = [{"bytes": b"a", "path": None}, {"bytes": None, "path": str(tmp_path / "b.png")}]
    data = Dataset(pa.table({"prompt": ["x", "y"], "image": images, "solution": ["1", "2"]}), [1, 0, 1])
    trainer = Trainer(MODEL, "format", {**BASE, "output_dir": str(tmp_path / "run")}, data)
    found = pq.read_table(given_files(trainer, monkeypatch) / "train.parquet").to_pylist()
    assert [(row["prompt"], row["image"]["bytes"], row["solution"]) for row in found] == [
        *[("y", b"b", "2"), ("x", b"a", "1"), ("y", b"b", "2")]
    ]


def test_the_real_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["x", "y"], "image": [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]}
    data = datasets.Dataset.from_dict(rows, datasets.Features(prompt=datasets.Value("string"), image=datasets.Image()))
    trainer = Trainer(MODEL, "format", {**BASE, "output_dir": str(tmp_path / "run")}, data.select([1]))
    (row,) = pq.read_table(given_files(trainer, monkeypatch) / "train.parquet").to_pylist()
    assert Image.open(pa.BufferReader(row["image"]["bytes"])).getpixel((0, 0)) == (0, 0, 255)


def test_values_that_are_no_column_are_named() -> None:
    (problem,) = problems_of(train_dataset=[{"prompt": "p", "meta": 1}, {"prompt": "p", "meta": {"a": 1}}])
    assert problem.startswith("train_dataset: column 'meta' cannot be stored")
    assert problems_of(train_dataset=[]) == ("train_dataset: it has no rows",)
    assert problems_of(train_dataset=["p", {}]) == ("train_dataset: row 0 is not a dictionary but str",)


# --- functions --------------------------------------------------------------------------------------------------------

SCORE = """
import json, sys
from rewards.base import ScoringRequest
from rewards.process.worker import RewardWorker
from rewards.registry import RewardSpec
worker = RewardWorker([RewardSpec(sys.argv[1])], 30.0)
request = ScoringRequest("rendered", ("one", "three"), "gold", columns=json.loads(sys.argv[2]))
print(json.dumps([[v.status, v.score] for v in worker.score(request).verdicts]))
worker.close()
"""


def scores(name: str, columns: Mapping[str, Any]) -> list[Any]:
    """In a process of its own, as a run has it: nothing of this one is there."""
    command = [sys.executable, "-c", SCORE, name, json.dumps(columns)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_functions_without_a_file_travel_to_the_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 4

    def short(completions, solution, **kwargs):
        return [None if s == text else float(len(text) < limit) for text, s in zip(completions, solution, strict=True)]

    rows = [{"prompt": "p", "solution": "three"}]
    args = {**BASE, "output_dir": str(tmp_path / "run")}
    trainer = Trainer(MODEL, [short, lambda completions: [1.0] * len(completions)], args, rows)
    folder = given_files(trainer, monkeypatch)
    names = [spec.name for spec in trainer.config.reward.functions]
    assert names == [f"{folder}/rewards.py:short", f"{folder}/rewards.py:reward_1"]
    assert scores(names[0], {"solution": "three"}) == [["scored", 1.0], ["unscorable", None]]
    assert trainer.config.data.columns == {"prompt": "prompt", "answer": None}, "functions read any column"


def test_functions_of_a_file_go_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_a_file.py").write_text(
        "def short(completions, solution):\n    return [1.0 for _ in completions]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    short = importlib.import_module("mine_of_a_file").short
    trainer = Trainer(MODEL, [short, json.dumps], BASE, [{"prompt": "p", "solution": "a"}])
    names = [spec.name for spec in trainer.config.reward.functions]
    assert names[0] == f"{tmp_path}/mine_of_a_file.py:short"
    assert names[1].endswith("given/rewards.py:dumps"), "it takes all columns, which are named in the file"


def test_functions_see_conversations_and_columns_as_trl_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(prompts, completions, **kwargs):
        assert prompts == [[{"role": "user", "content": [{"type": "text", "text": "p"}]}]] * 2
        assert [c[0]["role"] for c in completions] == ["assistant", "assistant"]
        assert kwargs == {"answer": ["48\n#### 72"] * 2}
        return [float(len(c[0]["content"])) for c in completions]

    prompt = [{"role": "user", "content": [{"type": "text", "text": "p", "image": None}]}]
    rows = [{"prompt": prompt, "answer": "48\n#### 72"}]
    trainer = Trainer(MODEL, check, {**BASE, "output_dir": str(tmp_path / "run")}, rows)
    given_files(trainer, monkeypatch)
    (spec,) = trainer.config.reward.functions
    assert scores(spec.name, {**rows[0]}) == [["scored", 3.0], ["scored", 5.0]]


def test_a_function_that_takes_the_request_is_called_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(request: ScoringRequest) -> list[saccade.Verdict]:
        return [saccade.Verdict.scored(float(text == request.answer)) for text in request.completions]

    trainer = Trainer(MODEL, exact, {**BASE, "output_dir": str(tmp_path / "run")}, [{"prompt": "p"}])
    given_files(trainer, monkeypatch)
    reward = load_reward(trainer.config.reward.functions[0].name)
    assert [v.score for v in reward(ScoringRequest("p", ("a", "b"), "b"))] == [0.0, 1.0]


def test_what_cannot_be_pickled_is_named() -> None:
    lock = __import__("threading").Lock()
    (problem,) = problems_of(reward_funcs=lambda completions: [lock], train_dataset=[{"prompt": "p"}])
    assert problem.startswith("reward_funcs[0]: it cannot be sent to the processes of rewards (TypeError")


def test_another_runs_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    trainer = Trainer(MODEL, "format", {**BASE, "output_dir": str(tmp_path)}, [{"prompt": "p"}])
    with pytest.raises(saccade.ConfigError, match="output_dir"):
        trainer.train()
    assert not (tmp_path / "given").exists()


def test_the_configuration_is_saved_like_any(tmp_path: Path) -> None:
    trainer = Trainer(MODEL, "format", {**BASE, "output_dir": str(tmp_path)}, [{"prompt": "p"}])
    assert parse_config(config_tree(trainer.config)) == trainer.config
