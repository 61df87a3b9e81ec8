"""The demo's recipe is a valid run of any length, and starting over removes only what a demo made."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.config.messages import ConfigError
from saccade.demo.demo import demo_config, prepare_folder
from saccade.demo.shapes import ShapesFiles

FILES = ShapesFiles(*(Path(f"{name}.parquet") for name in ("train", "test", "unseen", "blank")))


@pytest.mark.parametrize("steps", [1, 2, 5, 120])
def test_the_recipe_is_valid_for_any_number_of_steps(steps: int) -> None:
    config = demo_config(FILES, Path("warm"), Path("run"), seed=0, steps=steps)  # raises if it is not valid
    assert config.steps == steps
    assert config.off_policy.name == "behavior", "the demo samples ahead, so the ratio must know what sampled"
    assert {Path(file).stem for file in config.data.eval} == {"test", "unseen", "blank"}


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_text("old")
    (tmp_path / "summary.json").write_text("{}")
    prepare_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    prepare_folder(tmp_path / "missing")  # nothing there: nothing to do


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        prepare_folder(tmp_path)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "data").exists()
