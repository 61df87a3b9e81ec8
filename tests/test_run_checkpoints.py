"""Run checkpoints: complete or absent, the newest first, old ones removed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from driver import checkpoints
from driver.config import parse_config
from driver.errors import RunError
from driver.ledger import Ledger
from driver.run import Run
from rollout.data_actor import DataActorReport
from rollout.prompts import DataReport, Refusal


def write_learner(path):
    path.mkdir()
    (path / "weights").write_text("w")


def test_the_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        checkpoints.save(tmp_path, step, {"version": step}, write_learner, keep=2)
    assert checkpoints.found(tmp_path) == [2, 10]
    path, state = checkpoints.newest(tmp_path)
    assert path.name == "step-000010"
    assert state["version"] == 10
    assert (path / "learner" / "weights").read_text() == "w"


def test_a_failure_while_writing_leaves_the_former_one(tmp_path):
    checkpoints.save(tmp_path, 1, {"version": 1}, write_learner, keep=2)

    def broken(path):
        write_learner(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, 2, {"version": 2}, broken, keep=2)
    assert checkpoints.found(tmp_path) == [1]
    checkpoints.save(tmp_path, 2, {"version": 2}, write_learner, keep=2)  # the leftovers are in nobody's way
    assert checkpoints.found(tmp_path) == [1, 2]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints.save(tmp_path, 1, {"version": 1, "note": "old"}, write_learner, keep=1)
    checkpoints.save(tmp_path, 1, {"version": 1, "note": "new"}, write_learner, keep=1)
    assert checkpoints.newest(tmp_path)[1]["note"] == "new"


def test_a_learner_on_a_node_with_other_storage_is_told(tmp_path):
    with pytest.raises(RunError, match="storage that all nodes share"):
        checkpoints.save(tmp_path, 1, {}, lambda path: None, keep=1)
    assert checkpoints.found(tmp_path) == []


def test_nothing_to_resume_and_foreign_formats_are_said(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        checkpoints.newest(tmp_path / "absent")
    path = checkpoints.save(tmp_path, 1, {}, write_learner, keep=1)
    state = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(RunError, match="format 99"):
        checkpoints.newest(tmp_path)


def test_a_checkpoint_says_which_rows_were_not_used_as_they_are(tmp_path):
    refusal = Refusal("a.json", 7, "missing image", "image 0: no file x")
    report = DataReport(100, 40, {"missing image": 2}, (refusal, refusal), truncated=3)
    said: list[str] = []
    run = Run(
        config=parse_config(
            {"output_dir": str(tmp_path), "steps": 1, "model": {"path": "m"}, "data": {"train": ["a.json"]}}
        ),
        actors=SimpleNamespace(data_state=dict, data_report=lambda: DataActorReport(report, None, 0, 0)),
        learner=SimpleNamespace(save_checkpoint=write_learner),
        ledger=Ledger(),
        rollouts=SimpleNamespace(difficulty=None),
        evaluator=None,
        log=None,
        display=SimpleNamespace(phase=said.append),
    )
    run.checkpoint()
    assert said[1:] == [
        "data.train: 2 of 40 rows refused: 2 missing image; 3 truncated; the first: a.json row 7: image 0: no file x"
    ]
    report, run.version = DataReport(100, 80), 1
    run.checkpoint()
    assert len(said) == 3
