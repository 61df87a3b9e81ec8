"""Deployment files against the code: versions, resources, entry points, configurations, the README's commands."""

from __future__ import annotations

import subprocess
import sys


def test_torchvision_and_torchaudio_load_in_a_subprocess() -> None:
    """vLLM inspects models in a process of its own, so the hook must work without this one's help."""
    code = "import torchvision.transforms.v2, torchaudio, torch; print(torch.version.cuda)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
