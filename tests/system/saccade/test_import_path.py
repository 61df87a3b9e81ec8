"""A user's own folders named like our packages hide none of them, in any process of a run, and are found themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from saccade.demo.shapes import make_shapes
from vlm.import_path import NAMES

LENGTH = """
from rewards.helpers import count      # the user's own, under its folder's name
from helpers import count as same      # and by its own: the folder is on the path

assert count is not same and vars(count)["user"] == vars(same)["user"] == "yes"

def length(completions, **columns):
    return [count(text) for text in completions]
"""
HELPERS = """
def count(text):
    return float(len(text))
count.user = "yes"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with packages, a plain folder and a module that have the names of ours."""
    for name in ("rewards", "learner", "weight_sync"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s, not ours')")
    (tmp_path / "vlm").mkdir()
    (tmp_path / "rollout.py").write_text("raise RuntimeError('the user\\'s, not ours')")
    (tmp_path / "rewards/length.py").write_text(LENGTH)
    (tmp_path / "rewards/helpers.py").write_text(HELPERS)
    return tmp_path


def run(command: list[str], folder: Path, repository: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As from a shell in `folder`, with this project behind it on the import path."""
    environment = {**os.environ, "PYTHONPATH": str(repository), **variables}
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


WHERE = f"""
import importlib, json
print(json.dumps([importlib.import_module(name).__file__ for name in {NAMES}]))
"""


@pytest.mark.parametrize("working_dir_first", [False, True], ids=["beside", "as a submitted job has it"])
def test_names_of_our_packages_are_ours(folder: Path, repository: Path, working_dir_first: bool) -> None:
    paths = f"{folder}:{repository}" if working_dir_first else str(repository)
    done = run(["-c", "import saccade\n" + WHERE], folder, repository, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(repository / name / "__init__.py") for name in NAMES]


def test_a_script_finds_its_own_modules_in_them(folder: Path, repository: Path) -> None:
    (folder / "script.py").write_text(
        "import saccade\nfrom rewards.helpers import count\nimport rewards.base\nprint(count('four'))"
    )
    done = run(["script.py"], folder, repository)
    assert done.stdout == "4.0\n", done.stderr


def test_a_package_that_was_imported_before_is_named(folder: Path, repository: Path) -> None:
    (folder / "rewards/__init__.py").write_text("")
    done = run(["-c", "import rewards.helpers, saccade"], folder, repository)
    assert f"`rewards` was imported from {folder}/rewards/__init__.py before saccade" in done.stderr


def test_rewards_are_loaded_in_their_own_process(folder: Path, repository: Path) -> None:
    (folder / "completions.jsonl").write_text('{"prompt": "p", "completion": "four"}\n')
    command = ["-m", "saccade", "rewards", "score", "rewards/length.py:length", "completions.jsonl"]
    done = run(command, folder, repository)
    assert json.loads(done.stdout)["score"] == 4.0, done.stderr


def test_a_folder_without_such_names_stays_first(tmp_path: Path, repository: Path) -> None:
    done = run(["-c", "import saccade, sys; print(repr(sys.path[0]))"], tmp_path, repository)
    assert done.stdout == "''\n", done.stderr


@pytest.mark.slow
def test_a_run_trains_from_such_a_folder(folder: Path, repository: Path, tiny_model: Path) -> None:
    """Actors, the engine's and the learner's processes and the reward's child import ours; the reward is the user's."""
    make_shapes(folder / "data", train_rounds=1, unseen_rounds=1)
    config = {
        "output_dir": "run",
        "steps": 1,
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"train": ["data/train.parquet"], "max_prompt_length": 256},
        "rollout": {"num_generations": 2, "max_completion_length": 4, "kv_cache_gib": 0.25},
        "reward": {"functions": ["rewards/length.py:length"]},
        "learner": {"prompts_per_step": 2, "zero_stage": 1},
        "cluster": {"device": "cpu"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    done = run(["-m", "saccade", "train", "mine.yaml"], folder, repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run/model/model.safetensors").is_file()
