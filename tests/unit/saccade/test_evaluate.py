"""Evaluation: means over what was scored; what was not is tried again, counted, said, and never averaged in."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rollout.types import GroupSummary, PromptRef, RolloutFailure
from saccade.errors import RunError, RunStopped
from saccade.pipeline.evaluate import Evaluator, short_names, summarise
from tests.helpers.fake_fleet import FakeEngine, FakeRewards, Script, make_dispatcher, stored


def scored(uid: str, score: float | None, kind: str = "color") -> tuple[str, GroupSummary]:
    valid = score is not None
    parts = {"accuracy": (score,)} if score is not None else {}
    reasons = () if valid else ("error: division by zero",)
    ref = PromptRef(uid)
    return kind, GroupSummary(ref, (score or 0.0,), (valid,), parts, (1,), ("stop",), 2, 0, invalid_reasons=reasons)


def failed(uid: str) -> tuple[str, GroupSummary]:
    return "color", GroupSummary.of_failure(RolloutFailure(PromptRef(uid), "unreadable image", "rollout-0"))


def make_evaluator(script: Script, said: list[str], rows: int = 4, **changes) -> Evaluator:
    """Held-out rows in turn of kind a and b, through two engines and two attempts."""
    engines = [FakeEngine(script, name="a"), FakeEngine(script, name="b")]
    dispatcher = make_dispatcher(engines, [FakeRewards(), FakeRewards(slow=[3])], **changes)
    return Evaluator([(stored(row), "ab"[row % 2]) for row in range(rows)], dispatcher, said.append)


def test_means_are_over_scored_completions_by_file_and_group():
    cells = summarise(
        [
            scored("test.parquet:0", 1.0),
            scored("test.parquet:1", 0.0),
            scored("test.parquet:2", 1.0, "shape"),
            scored("test.parquet:3", None),
            failed("test.parquet:4"),
        ]
    )
    assert cells["test"]["color"] == {"reward": 0.5, "accuracy": 0.5, "n": 4.0, "failed": 2.0}
    assert cells["test"]["shape"] == {"reward": 1.0, "accuracy": 1.0, "n": 1.0, "failed": 0.0}


def test_a_mean_over_nothing_is_left_out():
    assert summarise([failed("test.parquet:0")]) == {"test": {"color": {"n": 1.0, "failed": 1.0}}}


def test_files_of_one_name_are_kept_apart():
    cells = summarise([scored("chart/test.parquet:0", 1.0), scored("doc/test.parquet:0", 0.0)])
    assert {name: cell["color"]["reward"] for name, cell in cells.items()} == {"chart/test": 1.0, "doc/test": 0.0}
    assert short_names(["a.parquet", "a.jsonl", "b.jsonl"]) == {
        "a.parquet": "a.parquet",
        "a.jsonl": "a.jsonl",
        "b.jsonl": "b",
    }


def test_it_goes_the_way_of_training_with_its_retries_and_can_be_repeated():
    said: list[str] = []
    slow = {"reason": "no answer in time", "retryable": True}
    evaluator = make_evaluator({0: [slow], 2: [slow, slow]}, said)
    first, second = asyncio.run(evaluator.run()), asyncio.run(evaluator.run())
    assert (
        first
        == second
        == {
            "d": {
                "a": {"reward": 0.5, "n": 2.0, "failed": 1.0},  # rewards 0 and 1 of row 0, at its second attempt
                "b": {"reward": 0.5, "n": 2.0, "failed": 1.0},  # row 3 had no score in time
            }
        }
    )
    assert said[0] == said[1]
    assert "3 completions without a score" in said[0]
    assert "no answer in time" in said[0] and "timeout: no score in 60 s" in said[0]
    a, b = evaluator.dispatcher.pool.actors
    assert [asked[:2] for asked in a.asked] == [(0, 0), (2, 0)] * 2
    assert [asked[:2] for asked in b.asked] == [(1, 0), (3, 0), (0, 1), (2, 1)] * 2
    assert evaluator.dispatcher.groups.outstanding() == [], "the ledger of the run is not touched"


def test_an_evaluation_whose_engine_nobody_replaces_is_none_and_it_can_be_stopped():
    with pytest.raises(RunError, match="a died: gone"):
        asyncio.run(make_evaluator({0: [{"reason": "gone", "engine_dead": True}]}, []).run())

    def stop() -> None:
        raise RunStopped

    evaluator = make_evaluator({}, [])
    with pytest.raises(RunStopped):
        asyncio.run(replace(evaluator, dispatcher=replace(evaluator.dispatcher, check_stop=stop)).run())
