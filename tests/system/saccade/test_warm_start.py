"""The warm start teaches the format and nothing else; its batches mark exactly the completions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from saccade.demo.shapes import ANSWERS, ShapesFiles
from saccade.demo.warm_start import warm_start
from tests.model.saccade.test_warm_start import files as files
from tests.model.saccade.test_warm_start import model as model
from vlm.families.registry import load_adapter


@pytest.mark.slow
def test_the_format_is_learned_and_the_answers_are_guesses(model: Path, files: ShapesFiles, tmp_path: Path) -> None:
    result = warm_start(model, files.train, files.test, tmp_path / "warm", seed=0)
    assert result.format_rate > 0.95
    assert 0.05 < result.loss < 0.4  # random answers keep it at about log(4.5) / 10 tokens = 0.15
    assert set(result.accuracy) == set(ANSWERS)
    assert all(share < 0.5 for share in result.accuracy.values())
    reloaded = load_adapter(str(result.model))
    assert reloaded.tokenizer.get_vocab() == load_adapter(str(model)).tokenizer.get_vocab()
    assert AutoModelForImageTextToText.from_pretrained(result.model).dtype == torch.float32
