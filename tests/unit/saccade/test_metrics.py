"""Step statistics by hand, and that every exporter shows the same numbers."""

from __future__ import annotations

import json
from math import inf, nan

import pytest

from learner.durable import strict_json
from rollout.types import GroupSummary, PromptRef
from saccade.observe.metrics import MetricsLog, group_statistics, read_metrics
from saccade.observe.timing import union_seconds


def summary(rewards, valid, lengths, reasons, **kwargs) -> GroupSummary:
    parts = {"accuracy": tuple(r for r, ok in zip(rewards, valid, strict=True) if ok)}
    return GroupSummary(PromptRef("u"), rewards, valid, parts, lengths, reasons, 5, 0, **kwargs)


def test_failed_completions_are_counted_and_never_averaged():
    first = summary((1.0, 0.0), (True, False), (4, 6), ("stop", "length"), invalid_reasons=("timeout: 30 s",))
    second = summary((0.5, 0.0), (True, True), (2, 2), ("stop", "stop"))
    statistics = group_statistics([first, second])
    assert statistics["reward"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert statistics["parts"] == {"accuracy": pytest.approx(0.5)}
    assert statistics["invalid"] == {"timeout: 30 s": 1}
    assert (statistics["samples"], statistics["tokens"], statistics["completion_length"]) == (4, 14, 3.5)
    assert statistics["truncated_share"] == 0.25


def test_figures_that_never_found_room_are_said_to_be_lost(tmp_path):
    said: list[str] = []
    log = MetricsLog(tmp_path, report=said.append)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.evaluation(1, {}, 1.0)
    log.model(1)
    log.close()
    assert len(said) == 2 and "No space left" in said[0]
    assert said[1] == "metrics.jsonl: 2 waiting records could not be written and are lost"
    (tmp_path / "metrics.jsonl").unlink()
    log.close()
    assert len(read_metrics(tmp_path, "model")) == 1, "written at the end, if there is room by then"


def test_figures_that_wait_are_dropped_too_where_a_run_goes_back(tmp_path):
    log = MetricsLog(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    for step in (1, 2, 3):
        log.model(step)
    (tmp_path / "metrics.jsonl").unlink()
    log.truncate_after(2)
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path, "model")] == [1, 2]


def no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_others_read_is_strict_json():
    value = {"a": [nan, (inf, 1.5, {"b": -inf})], "c": "NaN", "d": None, "e": True, "f": 7}
    expected = {"a": [None, [None, 1.5, {"b": None}]], "c": "NaN", "d": None, "e": True, "f": 7}
    assert json.loads(strict_json(value), parse_constant=no_json) == expected


def test_union_of_spans():
    assert union_seconds([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    assert union_seconds([]) == 0
