"""The demo's figures: derived by hand from made-up records, with exactly the promised keys, and a picture of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from rich.console import Console

from saccade.demo.curves import KIND_COLORS, accuracy_table, plot, speed_table, summarise
from saccade.errors import RunError

KINDS = ("color", "shape", "count")


def step(number: int, reward: float) -> dict:
    return {
        "step": number,
        "reward": reward,
        "parts": {"format": 1.0, "accuracy": reward - 0.5},
        "samples": 16,
        "tokens": 160,
        "seconds": {"rollout": 0.25, "learn": 0.5, "sync": 0.125, "driver": 0.0, "total": 1.0},
        "busy": {"generate/engine-0": 0.75, "generate/engine-1": 0.5, "reward": 0.0625},
    }


def evaluation(number: int, test: float, unseen: float = 0.5, blank: float = 0.25) -> dict:
    """Accuracy of one file for `color`; half of it for shape, a quarter for count."""

    def kinds(value: float) -> dict:
        return {kind: {"accuracy": value / 2**i, "format": 1.0, "n": 8.0} for i, kind in enumerate(KINDS)}

    results = {"test": kinds(test), "unseen": kinds(unseen), "blank": kinds(blank)}
    return {"step": number, "seconds": 1.0, "results": results}


STEPS = [step(1, 0.5), step(2, 0.75), step(3, 1.5)]
EVALUATIONS = [evaluation(0, 0.125), evaluation(2, 0.5), evaluation(3, 1.0, unseen=0.75, blank=0.25)]


def test_summary_has_the_promised_keys_and_figures() -> None:
    summary = summarise(STEPS, EVALUATIONS, warm_start_seconds=4.0, total_seconds=60.0)
    assert summary == {
        "accuracy": {
            "before": {"color": 0.125, "shape": 0.0625, "count": 0.03125},
            "after": {"color": 1.0, "shape": 0.5, "count": 0.25},
            "blank": {"color": 0.25, "shape": 0.125, "count": 0.0625},
            "unseen": {"color": 0.75, "shape": 0.375, "count": 0.1875},
        },
        # the busier engine 3 x 0.75; rewards 3 x 1/16; waits of the driver 3 x 0.5 and 3 x 0.125
        "seconds": {"warm_start": 4.0, "rollout": 2.25, "reward": 0.1875, "learn": 1.5, "sync": 0.375, "total": 60.0},
        "samples_per_second": 16.0,
        "tokens_per_second": 160.0,
    }
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_nothing_is_reported_where_nothing_was_measured() -> None:
    with pytest.raises(RunError, match="no step"):
        summarise([], EVALUATIONS, warm_start_seconds=0.0, total_seconds=1.0)
    with pytest.raises(RunError, match="no evaluation"):
        summarise(STEPS, [], warm_start_seconds=0.0, total_seconds=1.0)
    broken = evaluation(3, 1.0)
    broken["results"]["blank"]["shape"] = {"n": 8.0, "failed": 8.0, "reward": float("nan")}
    with pytest.raises(RunError, match=r"evaluation of blank.*shape"):
        summarise(STEPS, [*EVALUATIONS, broken], warm_start_seconds=0.0, total_seconds=1.0)


def test_tables_show_the_figures() -> None:
    summary = summarise(STEPS, EVALUATIONS, warm_start_seconds=4.0, total_seconds=60.0)
    console = Console(file=io.StringIO(), width=120)
    console.print(accuracy_table(summary), speed_table(summary))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if "color" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["color", "0.17", "0.12", "1.00", "0.25", "0.75"]
    for figure in ("4.0", "2.2", "60.0", "160"):
        assert figure in text


def test_the_picture_shows_every_curve(tmp_path: Path) -> None:
    plot(STEPS, EVALUATIONS, tmp_path / "curves.png", title="seed 0")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 800
    for color in KIND_COLORS.values():
        near = np.abs(pixels - np.array(ImageColor.getrgb(color))).max(-1) < 24
        assert near.sum() > 300, f"no curve of colour {color}"
