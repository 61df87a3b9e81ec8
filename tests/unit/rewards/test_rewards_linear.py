"""No text of 64,000 characters keeps a shipped reward busy or makes it raise: see tests/helpers/hostile_text.py."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

CPU_SECONDS = 240
"""What the kernel kills the program for; it takes a few seconds. A quadratic search on one text takes minutes."""


def test_every_shipped_reward_takes_linear_time_on_any_text() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hostile_text", "10"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        errors="replace",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS)),
        check=False,
    )
    assert done.stdout.endswith("done\n"), f"{done.stdout[-200:]}\n{done.stderr[-2000:]}"
