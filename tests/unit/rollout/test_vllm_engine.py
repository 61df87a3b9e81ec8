"""VLLMEngine on CPU, for real: the contract, and agreement of its log-probabilities with the Hugging Face model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollout.engines.log_tail import LogTail
from rollout.engines.protocol import EngineOptions, RolloutEngine
from rollout.engines.vllm_engine import VLLMEngine
from vlm.adapter import MultimodalAdapter
from vlm.config import ModelConfig
from vlm.families.registry import load_adapter


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> MultimodalAdapter:
    return load_adapter(str(tiny_model))


def test_it_is_a_rollout_engine(adapter: MultimodalAdapter) -> None:
    assert isinstance(VLLMEngine(EngineOptions(ModelConfig("x")), adapter), RolloutEngine)


def test_log_tail_keeps_what_children_say_and_passes_it_on(capfd: pytest.CaptureFixture[str]) -> None:
    log = LogTail(lines=3)
    with log.capture():
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; input(); print('\\n'.join('abcd')); sys.exit('e')"],
            stdin=subprocess.PIPE,
        )
    child.communicate(b"\n", timeout=30)  # it speaks after the capture ended, as an engine that dies later does
    assert log.text(wait=10.0) == "c\nd\ne"
    os.write(1, b"after\n")
    out, err = capfd.readouterr()
    assert "a\nb\nc\nd\ne\n" in err and out == "after\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_one_is_refused(adapter: MultimodalAdapter) -> None:
    engine = VLLMEngine(EngineOptions(ModelConfig("x"), device="cuda"), adapter)
    with pytest.raises(RuntimeError, match=r"no CUDA GPU here.*cluster\.device=cpu"):
        asyncio.run(engine.start())
