"""Evaluation: means over what was scored; what was not is counted, said, and never averaged in."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, Prompt, PromptRef, RolloutFailure
from saccade.errors import RunError
from saccade.pipeline.evaluate import Evaluator, short_names, summarise


def scored(uid: str, score: float | None, kind: str = "color") -> tuple[Prompt, GroupSummary]:
    prompt = Prompt(PromptRef(uid), "p", np.zeros(2, np.int32), 2, columns={"kind": kind})
    valid = score is not None
    parts = {"accuracy": (score,)} if score is not None else {}
    reasons = () if valid else ("error: division by zero",)
    return prompt, GroupSummary(
        prompt.ref, (score or 0.0,), (valid,), parts, (1,), ("stop",), 2, 0, invalid_reasons=reasons
    )


def failed(uid: str, **why: bool) -> tuple[Prompt, GroupSummary]:
    prompt, _ = scored(uid, 0.0)
    return prompt, GroupSummary.of_failure(RolloutFailure(prompt.ref, "unreadable image", "rollout-0", **why))


def evaluator(said: list[str]) -> Evaluator:
    return Evaluator([], [], [], SamplingParams(), None, 1.0, report=said.append)


def test_means_are_over_scored_completions_by_file_and_group():
    cells = summarise(
        [
            scored("test.parquet:0", 1.0),
            scored("test.parquet:1", 0.0),
            scored("test.parquet:2", 1.0, "shape"),
            scored("test.parquet:3", None),
            failed("test.parquet:4"),
        ],
        "kind",
    )
    assert cells["test"]["color"] == {"reward": 0.5, "accuracy": 0.5, "n": 4.0, "failed": 2.0}
    assert cells["test"]["shape"] == {"reward": 1.0, "accuracy": 1.0, "n": 1.0, "failed": 0.0}


def test_a_mean_over_nothing_is_left_out():
    assert summarise([failed("test.parquet:0")], None) == {"test": {"all": {"n": 1.0, "failed": 1.0}}}


def test_files_of_one_name_are_kept_apart():
    cells = summarise([scored("chart/test.parquet:0", 1.0), scored("doc/test.parquet:0", 0.0)], None)
    assert {name: cell["all"]["reward"] for name, cell in cells.items()} == {"chart/test": 1.0, "doc/test": 0.0}
    assert short_names(["a.parquet", "a.jsonl", "b.jsonl"]) == {
        "a.parquet": "a.parquet",
        "a.jsonl": "a.jsonl",
        "b.jsonl": "b",
    }


def test_what_has_no_score_is_said_with_its_reason():
    said: list[str] = []
    evaluator(said)._report_failures([failed("t:0")[1], scored("t:1", None)[1], scored("t:2", 1.0)[1]])
    (text,) = said
    assert "2 completions without a score" in text
    assert "unreadable image" in text
    assert "division by zero" in text


def test_an_evaluation_with_a_dead_engine_is_none():
    with pytest.raises(RunError, match="engine rollout-0 died during the evaluation"):
        evaluator([])._report_failures([failed("t:0", engine_dead=True)[1]])
