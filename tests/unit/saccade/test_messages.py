"""Mistakes that newcomers make, and what they are told: what is wrong, where, what to do, in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saccade.config.load import load_config, parse_config
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig

MINIMAL = "{output_dir: runs/x, steps: 10, model: {path: m}, data: {train: a.parquet}}"
CHOICES = "should be 'grpo', 'rloo', 'dr_grpo', 'dapo', 'gspo', 'cispo' or 'reinforce_pp'"

TOLD = {
    # types
    "steps=many": "steps='many': should be a whole number",
    "steps=1.5": "steps=1.5: should be a whole number",
    "steps=null": "steps=null: should be a whole number",
    "steps=0": "steps=0: should be at least 1",
    "learner.learning_rate=fast": "learner.learning_rate='fast': should be a number",
    "learner.learning_rate=0": "learner.learning_rate=0: should be more than 0",
    "learner.learning_rate=.inf": "learner.learning_rate=inf: should be a finite number",
    "learner.learning_rate=.nan": "learner.learning_rate=nan: should be a finite number",
    "learner.betas=0.9": "learner.betas=0.9: should be a list",
    "learner.betas=[0.9]": "learner.betas.1: the value is missing",
    "learner.betas=[0.9, 0.9, 0.9]": "should have 2 values, not 3",
    "learner.betas=[0.9, 2]": "learner.betas.1=2: should be less than 1",
    "data.max_refused_share=2": "should be at most 1",
    "data.shuffle=maybe": "data.shuffle='maybe': should be true or false",
    "data.columns=3": "data.columns=3: should be a mapping of names to values",
    "data.train=3": "data.train=3: should be a list",
    "data.train=[3]": "data.train.0=3: should be a text",
    "data.train=[]": "data.train names no files: there is nothing to train on",
    "model.path=''": "model.path='': should not be empty",
    "model.freeze=null": "model.freeze=null: should be a list",
    "learner=3": "learner=3: should be a mapping of names to values",
    "reward.functions=3": "reward.functions=3: should be a list",
    "reward.functions=[{nme: accuracy}]": "reward.functions.0.nme: unknown key; did you mean name?",
    "reward.functions=[{name: accuracy, tolerance: 1}]": "choose one of name, weight, options, combine",
    # values
    "algorithm=gpro": f"algorithm.name='gpro': did you mean grpo? {CHOICES}",
    "algorithm.loss=ppo": "did you mean ppo_clip?",
    "algorithm.kl={weight: 1.0, estimator: low_var_kl}": "did you mean k3?",
    "algorithm.aggregation=seq-mean-token-mean": "did you mean sequence?",
    "cluster.device=gpu": "did you mean cuda?",
    "model.dtype=bf16": "did you mean bfloat16?",
    "learner.zero_stage=4": "learner.zero_stage=4: should be 0, 1, 2 or 3",
    # keys
    "learner.rankz=1": "learner.rankz: unknown key; did you mean learner.ranks?",
    "learner.batch_size=8": "here it is called learner.prompts_per_step",
    "num_epochs=8": "here it is called steps (epochs x rows / learner.prompts_per_step)",
    "num_train_epochs=8": "here it is called steps (epochs x rows / learner.prompts_per_step)",
    "algorithm.kl_coef=0.1": "here it is called algorithm.kl.weight",
    "rollout.max_tokens=8": "here it is called rollout.max_completion_length",
    "max_new_tokens=8": "here it is called rollout.max_completion_length",
    "data.train_batch_size=8": "here it is called learner.prompts_per_step",
    "per_device_train_batch_size=8": "here it is called learner.prompts_per_step",
    "rollout.n=8": "here it is called rollout.num_generations",
    "algorithm.adv_estimator=grpo": "here it is called algorithm.advantage",
    "save_steps=8": "here it is called checkpoint.every",
    # what does not go together
    "rollout.num_generations=1": "compares the completions of one prompt with each other; use at least 2",
    "learner.prompts_per_step=5 algorithm.optimizer_steps=2": "cannot be divided evenly",
    "rollout.top_p=0.9": "the learner cannot reproduce a filtered distribution",
}
TAKEN = {
    "data.train=b.parquet": ("data.train", ("b.parquet",)),
    "data.eval=b.parquet": ("data.eval", ("b.parquet",)),
    "data.media_from=urls": ("data.media_from", ("urls",)),
    "model.freeze=vision": ("model.freeze", ("vision",)),
    "model.lora.targets=vision": ("model.lora.targets", ("vision",)),
    "learner.gradient_checkpointing=vision": ("learner.gradient_checkpointing", ("vision",)),
}


def configured(tmp_path: Path, overrides: list[str], text: str = MINIMAL) -> RunConfig:
    (tmp_path / "mine.yaml").write_text(text)
    return load_config(tmp_path / "mine.yaml", overrides)


def read(config: RunConfig, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("mistake", TOLD)
def test_a_mistake_is_told_in_plain_words(mistake: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path, mistake.split() if mistake.count("=") > 1 else [mistake])
    assert TOLD[mistake] in str(caught.value)
    for words in ("input should", "tuple", "valid", "instance", "None", "dict"):
        assert words not in str(caught.value)


@pytest.mark.parametrize("given", TAKEN)
def test_one_text_is_a_list_of_one(given: str, tmp_path: Path) -> None:
    name, value = TAKEN[given]
    assert read(configured(tmp_path, given.split()), name) == value


@pytest.mark.parametrize("given", ["accuracy", "[accuracy]", "{name: accuracy}", "[{name: accuracy}]"])
def test_a_reward_is_its_name(given: str, tmp_path: Path) -> None:
    (reward,) = configured(tmp_path, [f"reward.functions={given}"]).reward.functions
    assert (reward.name, reward.weight) == ("accuracy", 1.0)


def test_a_section_left_empty_has_its_defaults(tmp_path: Path) -> None:
    text = MINIMAL.replace("}}", "}, learner: , rollout: }")
    assert configured(tmp_path, ["learner.learning_rate=2e-6"], text) == configured(
        tmp_path, ["learner.learning_rate=2e-6"]
    )
    with pytest.raises(ConfigError, match=r"model.path: required, but not given"):
        parse_config({"output_dir": "x", "steps": 1, "model": None, "data": {"train": "a"}})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty; a configuration gives at least output_dir, steps, model.path and data.train"),
        (b"words", "found 'words'; a configuration gives at least"),
        (b"\xff\xfe", "the file is not UTF-8 text"),
        (b"steps: [1", 'in "mine.yaml", line 1, column 8'),
        (b"steps: 1\nsteps: 2", "line 2: the key 'steps' appears twice; keep one"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "mine.yaml")
    assert told in str(caught.value)
