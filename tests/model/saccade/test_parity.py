"""vLLM and the learner agree on every family, on tiny models; and the comparison notices when they do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from saccade import cli
from saccade.commands.parity import TOLERANCES, CaseResult
from saccade.config.messages import ConfigError
from vlm.families.qwen_vl import QwenVLAdapter

TOLERANCE = TOLERANCES["float32"]


class OtherPixels(QwenVLAdapter):
    """A learner that sees images darker than the engine does."""

    def processor_arguments(self, media: Sequence[Sequence[Any]]) -> dict[str, Any]:
        given = super().processor_arguments(media)
        if "images" in given:
            given["images"] = [Image.fromarray((np.asarray(i) * 0.5).astype(np.uint8)) for i in given["images"]]
        return given


def test_an_agreement_that_does_not_depend_on_the_pixels_is_none() -> None:
    same = CaseResult("1 image", 40, 32, largest=1e-7, mean=1e-8, moved=2.0)
    assert same.agrees(TOLERANCE)
    assert not CaseResult("1 image", 40, 32, largest=1e-7, mean=1e-8, moved=0.0).agrees(TOLERANCE)
    assert not CaseResult("1 image", 40, 32, largest=4e-5, mean=1e-8, moved=2.0).agrees(TOLERANCE)
    assert not CaseResult("1 image", problem="first at position 3").agrees(TOLERANCE)
    assert not CaseResult("1 image").agrees(TOLERANCE)


@pytest.mark.parametrize("given", [[], ["m", "--tiny", "all"], ["--tiny", "qwen9"]])
def test_what_to_compare_must_be_one_thing_that_exists(given: list[str]) -> None:
    result = CliRunner().invoke(cli.app, ["parity", *given])
    assert isinstance(result.exception, ConfigError)
    assert re.search(r"--tiny|no tiny model", str(result.exception))
