"""Rewards that fail for too much of a batch stop the run, and say why; what each reward costs is among the metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollout.types import GroupSummary, PromptRef
from saccade.config.load import load_config, parse_config
from saccade.config.messages import ConfigError
from saccade.config.options import trace_shown
from saccade.errors import RunError
from saccade.observe.metrics import group_statistics
from saccade.pipeline.reward_failures import check_failures


def summary(row: int, reasons: tuple[str, ...], scored: int = 0, seconds: float = 0.0) -> GroupSummary:
    """A group of which some completions have no score."""
    count = len(reasons) + scored
    return GroupSummary(
        ref=PromptRef(f"train:{row}"),
        rewards=(1.0,) * scored + (0.0,) * len(reasons),
        valid=(True,) * scored + (False,) * len(reasons),
        parts={"mine": (1.0,) * scored},
        lengths=(5,) * count,
        finish_reasons=("stop",) * count,
        prompt_length=3,
        oldest_version=0,
        invalid_reasons=reasons,
        invalid_excerpts=tuple(f"text {row}" for _ in reasons),
        part_seconds={"mine": seconds} if seconds else {},
    )


def test_failures_are_grouped_with_an_example_of_each() -> None:
    batch = [
        summary(0, ("error: mine: ValueError: no number in 'red' (mine.py:3 in f)",) * 2, scored=2),
        summary(1, ("error: mine: ValueError: no number in 'blue' (mine.py:3 in f)",) * 1, scored=3),
        summary(2, ("timeout: the rewards took longer than 30 s for the group",) * 2, scored=2),
    ]
    with pytest.raises(RunError) as caught:
        check_failures(batch, 0.4)  # 5 of 12 failed
    assert str(caught.value).splitlines() == [
        "the rewards failed for 5 of 12 completions of a batch, more than reward.max_failed_share=0.4 allows:",
        "  3 x error: mine: ValueError: no number in 'red' (mine.py:3 in f) "
        "(prompt train:0 (epoch 0, attempt 0), completion 'text 0')",
        "  2 x timeout: the rewards took longer than 30 s for the group "
        "(prompt train:2 (epoch 0, attempt 0), completion 'text 2')",
    ]
    check_failures(batch, 5 / 12)  # exactly the share that may fail


def test_what_cannot_be_scored_is_no_failure() -> None:
    check_failures([summary(0, ("unscorable: accuracy: the row has no answer",) * 8)], 0.0)
    check_failures([], 0.0)


def test_rare_kinds_are_counted_together() -> None:
    batch = [summary(i, (f"error: {'abcdefg'[i]}",)) for i in range(7)]
    with pytest.raises(RunError, match="and 2 for other reasons"):
        check_failures(batch, 0.5)


def test_gates_cannot_be_normalised_apart(tmp_path: Path) -> None:
    tree = {"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["t.parquet"]}}
    functions = [{"name": "format", "combine": "product"}, {"name": "accuracy"}]
    with pytest.raises(ConfigError, match=r"cannot be combined with format \(combine: product\)"):
        parse_config({**tree, "algorithm": {"advantage": "gdpo"}, "reward": {"functions": functions}})


def test_latency_is_the_mean_over_the_groups_that_a_reward_was_timed_for() -> None:
    batch = [summary(0, (), scored=2, seconds=0.5), summary(1, (), scored=2, seconds=1.5), summary(2, ("error: x",))]
    statistics = group_statistics(batch)
    assert statistics["reward_seconds"] == {"mine": 1.0}
    assert statistics["invalid"] == {"error: x": 1}


def test_the_trace_of_the_run_is_that_of_its_format_reward(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    tree = {"output_dir": "x", "steps": 1, "model": {"path": "m"}, "data": {"train": ["t.parquet"]}}
    path.write_text(json.dumps(tree))
    assert trace_shown(load_config(path)) == "visible"
    assert trace_shown(load_config(path, ["reward.functions=accuracy"])) == "visible"
    functions = "reward.functions=[{name: format, combine: product, options: {trace: internal, style: newline}}]"
    config = load_config(path, [functions])
    (spec,) = config.reward.functions
    assert (spec.combine, dict(spec.options)) == ("product", {"trace": "internal", "style": "newline"})
    assert trace_shown(config) == "internal"
