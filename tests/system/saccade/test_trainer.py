"""The first example of docs/api.md trains: rows with images and functions of the script itself, through a local Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CPU = """"cluster.device": "cpu", "model.dtype": "float32", "learner.zero_stage": 1, "rollout": {"kv_cache_gib": 0.25,
    "num_generations": 2, "max_completion_length": 4}, "data.max_prompt_length": 256, """


@pytest.mark.slow
def test_the_first_example_trains(tiny_model: Path, repository: Path, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (repository / "docs/api.md").read_text(), re.DOTALL)[0]
    code = code.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tiny_model)).replace('"steps": 1', f'{CPU}"steps": 1')
    (tmp_path / "example.py").write_text(code)
    command, environment = [sys.executable, "example.py"], {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(done.stdout.splitlines()[-1], "model.safetensors").is_file()
    metrics = (tmp_path / "runs/colors/metrics.jsonl").read_text()
    assert '"rewards:right"' in metrics
    assert '"rewards:reward_1"' in metrics
