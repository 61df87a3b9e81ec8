"""A saved configuration works from any folder: its paths are absolute, and code of the user's is found by file."""

from __future__ import annotations

import glob
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rewards.base import ScoringRequest
from rewards.config import RewardSpec
from rewards.registry import build_rewards
from saccade.config.load import dump_config, parse_config
from saccade.config.run_config import RunConfig
from saccade.config.saved_paths import JOB_CONFIG, absolute
from vlm.user_code import UserCodeError, find, located, name_of, short

CODE = "def brevity(completions):\n    return [1.0 for _ in completions]\nclass Family: ...\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, rewards as file and as module, and an adapter."""
    home = tmp_path / "home"
    (home / "models/mine").mkdir(parents=True)
    (home / "code").mkdir()
    for name in ("saved_rewards.py", "saved_family.py", "code/more.py"):
        (home / name).write_text(CODE)
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def config(home: Path) -> RunConfig:
    return parse_config(
        {
            "output_dir": "runs/x",
            "steps": 1,
            "model": {"path": "models/mine", "adapter": "saved_family:Family"},
            "data": {
                "train": ["data/*.parquet", "/abs/b.parquet"],
                "eval": "c.parquet",
                "media_from": ["images", "urls"],
            },
            "reward": {
                "functions": [
                    "accuracy",
                    "saved_rewards:brevity",
                    "code/more.py:brevity",
                    "package.module:f",
                    {"name": "reward_model", "options": {"model": "models/mine"}},
                ]
            },
        }
    )


def test_brackets_of_the_working_directory_are_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a[1]b").mkdir()
    (tmp_path / "a[1]b/x.parquet").touch()
    monkeypatch.chdir(tmp_path / "a[1]b")
    given = {"output_dir": "x", "steps": 1, "model": {"path": "~/m"}, "data": {"train": "*.parquet"}}
    saved = absolute(parse_config(given))
    assert glob.glob(saved.data.train[0]) == [f"{tmp_path}/a[1]b/x.parquet"]
    assert saved.model.path == str(Path.home() / "m")


def test_paths_are_saved_absolute_and_mean_the_same(config: RunConfig, home: Path) -> None:
    saved = absolute(config)
    assert saved.model.path == f"{home}/models/mine"
    assert saved.model.adapter == f"{home}/saved_family.py:Family"
    assert saved.data.train == (f"{home}/data/*.parquet", "/abs/b.parquet")
    assert saved.data.eval == (f"{home}/c.parquet",)
    assert saved.data.media_from == (f"{home}/images", "urls")
    assert [f.name for f in saved.reward.functions] == [
        "accuracy",
        f"{home}/saved_rewards.py:brevity",
        f"{home}/code/more.py:brevity",
        "package.module:f",
        "reward_model",
    ]
    assert saved.reward.functions[-1].options == {"model": f"{home}/models/mine"}
    assert parse_config(yaml.safe_load(dump_config(saved))) == saved == absolute(saved)


def test_names_of_hubs_stay(config: RunConfig) -> None:
    hub = config.model_copy(update={"model": replace(config.model, path="Qwen/Qwen2.5-VL-3B-Instruct")})
    assert absolute(hub).model.path == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_job_that_was_shipped_its_folder_keeps_relative_paths(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    assert absolute(config) == config
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"env_vars": {}}}))
    assert absolute(config) != config


def test_code_is_found_from_another_folder_under_the_same_short_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["saved_rewards:brevity", "code/more.py:brevity"]
    there = [located(name) for name in names]
    monkeypatch.chdir(tmp_path)
    request = ScoringRequest("?", ("a", "b"))
    parts = [verdict.parts for verdict in build_rewards([RewardSpec(name) for name in there])(request)]
    assert parts == [{"saved_rewards:brevity": 1.0, "more:brevity": 1.0}] * 2
    assert [short(name) for name in names] == [short(name) for name in there]
    assert find(name_of(find(there[0]))) is find(there[0])


def test_what_is_not_there_is_said_with_what_is(home: Path) -> None:
    with pytest.raises(UserCodeError, match=r"saved_rewards has no 'brevty'; it has: brevity, Family"):
        find("saved_rewards:brevty")
    with pytest.raises(UserCodeError, match=r"no file other.py in"):
        find("other.py:f")
