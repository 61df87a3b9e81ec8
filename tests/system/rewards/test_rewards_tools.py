"""`saccade rewards score` and `saccade rewards check`: a verdict for every line, and rewards caught at what they do."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from saccade.cli import app
from saccade.commands.reward_check import JUNK
from saccade.demo.shapes import make_shapes


def test_the_rewards_of_a_run_are_probed_with_its_own_data(tiny_model: Path, tmp_path: Path) -> None:
    make_shapes(tmp_path / "data", seed=0, train_rounds=1, unseen_rounds=1)
    path = tmp_path / "run.yaml"
    data = {"train": [str(tmp_path / "data" / "train.parquet")], "max_prompt_length": 256}
    # A batch of one group: generation takes its time.
    rollout = {"max_completion_length": 12, "engine_options": {"max_num_seqs": 8}}
    settings = {"output_dir": "x", "steps": 1, "model": {"path": str(tiny_model)}, "data": data, "rollout": rollout}
    path.write_text(json.dumps(settings))
    result = CliRunner().invoke(app, ["rewards", "check", str(path), "--rows", "3", "--token-ms", "1000"])
    assert result.exit_code == 0, result.output
    assert "nothing to report" in result.stdout and "all together" in result.stdout
    functions = "reward.functions=[{name: accuracy}, {name: length, options: {maximum: 99}}]"
    result = CliRunner().invoke(app, ["rewards", "check", str(path), functions, "--rows", "3"])
    assert result.exit_code == 1 and "length: gives empty completions up to 1; its minimum is 0" in result.stdout
    assert JUNK not in result.stdout
