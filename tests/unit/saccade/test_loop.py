"""The loop of `saccade/loop.py` over a fleet without Ray: what is trained, when, how often, and after a resume."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.types import ContentsLostError, LearnerError
from rollout.data.actor import DataActorReport
from rollout.data.source import DataReport
from rollout.types import PromptRef
from saccade import checkpoints
from saccade.config.load import parse_config
from saccade.fleet.engine_fleet import EngineFleet
from saccade.loop import step
from saccade.observe.display import SilentDisplay
from saccade.pipeline.groups import DropReason
from saccade.run import Run, restore
from tests.helpers.fake_fleet import FakeLearner, make_pipeline

SLOW = {"reason": "no answer in time", "retryable": True}
SCRIPT = {1: [SLOW], 4: [{"reason": "too long"}], 7: [SLOW, SLOW]}
"""Row 1 is generated at its second attempt, rows 4 and 7 never."""
STEPS = 4


def make_run(directory: Path, staleness: int, **learner: Any) -> Run:
    """Three groups a step, a checkpoint after each."""
    config = parse_config(
        {
            "output_dir": str(directory),
            "steps": STEPS,
            "model": {"path": "m"},
            "data": {"train": ["a.json"]},
            "rollout": {"max_staleness": staleness},
            "learner": {"prompts_per_step": 3},
            "checkpoint": {"every": 1},
        }
    )
    rollouts = make_pipeline(SCRIPT, staleness=staleness, batches=STEPS)
    pool = rollouts.dispatcher.pool
    actors = SimpleNamespace(
        learner=FakeLearner(pool.actors, **learner),
        data_report=lambda: DataActorReport(DataReport(99, 1), None, 0, 0),
        kept=nullcontext,
    )
    log = SimpleNamespace(step=lambda record: None, flush=lambda: None, truncate_after=lambda step: 0)
    fleet = EngineFleet(pool, actors.learner, 60.0)
    return Run(config, actors, fleet, rollouts, None, log, SilentDisplay(), None)  # type: ignore[arg-type]


def steps(run: Run, count: int) -> None:
    """Do so many steps."""

    async def do() -> None:
        async with run.rollouts.running():
            for _ in range(count):
                await step(run, run.config)

    asyncio.run(do())


def trained(run: Run) -> list[tuple[int, int]]:
    """Row, and the version that sampled it."""
    learner: Any = run.learner
    return [(group.prompt.ref.row, group.completions[0].oldest_version) for group in learner.trained]


@pytest.mark.parametrize("staleness", [0, 1, 2, 9])
def test_every_prompt_is_trained_once_or_dropped_and_no_token_is_too_old(tmp_path, staleness):
    run = make_run(tmp_path, staleness)
    steps(run, STEPS)
    rows = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]
    batches = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [row for row, _ in trained(run)] == rows
    assert all(0 <= batch - version <= staleness for batch, (_, version) in zip(batches, trained(run), strict=True))
    assert run.rollouts.groups.outstanding() == [] and run.rollouts.groups.trained == 10
    assert {detail: n for (_, detail), n in run.rollouts.groups.dropped.items()} == {
        "too long": 1,
        "no answer in time": 1,
    }


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resume_trains_what_was_issued_and_not_trained_and_nothing_twice(tmp_path, staleness):
    run = make_run(tmp_path, staleness, fails={2})
    with pytest.raises(LearnerError):
        steps(run, 3)
    assert run.version == 2
    again = make_run(tmp_path, staleness)
    asyncio.run(restore(again, *checkpoints.newest(tmp_path / "checkpoints", print)))
    assert again.version == 2 and again.rollouts.groups.trained == 5
    steps(again, 2)
    assert [row for row, _ in trained(run) + trained(again)] == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]
    assert again.rollouts.groups.trained == 10 and again.rollouts.groups.outstanding() == []
    assert sum(again.rollouts.groups.dropped.values()) == 2


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_whose_contents_are_lost_are_issued_again_and_the_others_are_kept(tmp_path, staleness):
    run = make_run(tmp_path, staleness)
    learner: Any = run.learner
    lost = [PromptRef("d:1", 0, 1, 1)]  # at its second attempt
    whole = learner.update

    def update(groups: Any, summaries: Any, version: int) -> Any:
        if lost:
            raise ContentsLostError([lost.pop()])
        return whole(groups, summaries, version)

    learner.update = update

    async def two() -> None:
        async with run.rollouts.running():
            await step(run, run.config)
            assert (run.version, trained(run)) == (0, [])
            known = [PromptRef("d:0", 0, 0, 0), PromptRef("d:1", 0, 2, 1), PromptRef("d:2", 0, 0, 2)]
            assert [g.ref for g in run.rollouts.groups.of(0)] == known
            await step(run, run.config)

    asyncio.run(two())
    assert (run.version, sorted(row for row, _ in trained(run))) == (1, [0, 1, 2])
    assert run.rollouts.groups.dropped[DropReason.LOST, ""] == 1 and run.rollouts.groups.trained == 3
