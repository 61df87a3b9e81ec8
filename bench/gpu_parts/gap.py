"""Compare log-probabilities of vLLM and the learner in bfloat16 on tiny models, with `saccade parity` as a user runs
it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu_parts.common import Setting

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl")


def run(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    checks = {}
    for family in FAMILIES[:1] if setting.small else FAMILIES:
        with tempfile.TemporaryDirectory(prefix="saccade-bench-") as folder:
            written = Path(folder) / "parity.json"
            command = [sys.executable, "-m", "saccade", "parity", "--tiny", family, "--json", str(written)]
            command += ["--device", setting.device, "--dtype", "bfloat16"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
            if not written.exists():
                raise RuntimeError(f"parity of {family} ended with {done.returncode}: {done.stderr[-1500:]}")
            found[family] = json.loads(written.read_text())
        checks[f"{family}: agrees"] = done.returncode == 0
    return {**found, "checks": checks}
