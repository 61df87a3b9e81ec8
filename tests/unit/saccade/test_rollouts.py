"""The pipeline over a fleet without Ray: order, retries, failures, staleness, stopping, resuming."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rollout.types import GroupSummary, PromptRef, StoredGroup, Together, draw_seed
from saccade.errors import RunError, RunStopped
from saccade.fleet.pool import Pool
from saccade.pipeline.admission import Strict, checked_lag
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.groups import DropReason, GroupBuffer
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.rollouts import RolloutPipeline
from saccade.pipeline.sealed_batch import SealedBatch
from tests.helpers.fake_fleet import Driven, FakeData, FakeEngine, FakeRewards, make_dispatcher, make_pipeline

Drive = Callable[..., Driven]


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Runs the loops of a pipeline: of one that is given, or of one made as `make_pipeline` says."""
    driven: list[Driven] = []

    def make(*given: Any, **changes: Any) -> Driven:
        one = given[0] if given and isinstance(given[0], RolloutPipeline) else make_pipeline(*given, **changes)
        driven.append(Driven(one))
        return driven[-1]

    yield make
    for one in driven:
        one.close()


def engine(run: Driven) -> FakeEngine:
    found: FakeEngine = run.pipeline.dispatcher.pool.members[0].actor
    return found


def dropped(run: Driven) -> dict[str, int]:
    """Groups given up, by detail, or by reason where there is none."""
    return {detail or reason: n for (reason, detail), n in run.groups.dropped.items()}


def rows(batch: SealedBatch) -> list[int]:
    return [s.ref.row for s in batch.summaries]


def test_batches_are_admitted_once_and_sealed_in_order_of_admission(drive):
    run = drive(staleness=1)
    assert run.admit(0) == 6
    assert run.admit(0) == 0
    first, second = run.batch(0), run.batch(1)
    assert (rows(first), rows(second)) == ([0, 1, 2], [3, 4, 5])
    assert [b for b, _ in run.groups.outstanding()] == [0, 0, 0, 1, 1, 1]
    assert first.summaries[0].rewards == (0.0, 1.0)
    assert isinstance(first.groups[2], StoredGroup) and first.groups[2].group.prompt.ref.row == 2
    assert [v.score for v in first.groups[2].verdicts] == [0.0, 1.0]
    assert engine(run).seeds(4) == [draw_seed(5, "d:4", 0)]
    run.pipeline.book(first, ())
    assert run.groups.trained == 3 and [b for b, _ in run.groups.outstanding()] == [1, 1, 1]


def test_nothing_is_admitted_beyond_the_last_step_or_before_its_weights(drive):
    run = drive(staleness=2, batches=4)
    run.settle()
    assert engine(run).asked == []  # an evaluation at the start has the engines for itself
    assert [run.admit(version) for version in (0, 0, 1, 2, 3)] == [9, 0, 3, 0, 0]
    assert list(Strict(0, 4).due(GroupBuffer(), 0)) == [0]


def test_a_place_in_a_batch_has_its_engine_and_a_further_attempt_the_next_one(drive):
    slow = {"reason": "no answer in time", "retryable": True}
    engines = [FakeEngine(name="a"), FakeEngine({1: [slow]}, name="b")]
    rewards = [FakeRewards()]
    for staleness, start in ((0, Together("1", 2)), (1, None)):
        for one in engines:
            one.asked.clear()
        dispatcher = make_dispatcher(engines, rewards)
        stream = PromptStream(Pool([FakeData()]), 60.0)
        run = drive(RolloutPipeline(stream, dispatcher, Strict(staleness, 1), prompts_per_step=3))
        run.admit(0)
        assert [s.engine for s in run.batch(0).summaries] == ["a", "a", "a"]  # row 1 failed at its own engine
        assert [(row, attempt) for row, attempt, *_ in engines[0].asked] == [(0, 0), (2, 0), (1, 1)]
        assert [asked[3] for asked in engines[0].asked] == [start, start, None]
        assert [asked[3] for asked in engines[1].asked] == [None if start is None else Together("1", 1)]


@pytest.mark.parametrize("staleness", [0, 2])
def test_after_a_resume_what_was_issued_comes_first_and_no_earlier_than_due(staleness, drive):
    state = {
        "ledger": {
            "outstanding": [  # one of three was dropped
                {"batch": batch, "late": False, "ref": {"uid": f"d:{row}", "epoch": 0, "attempt": 1, "row": row}}
                for batch, row in ((4, 40), (4, 41), (5, 50), (5, 51))
            ],
            "trained": 12,
            "dropped": [[DropReason.FAILED, "too long", 2]],
            "quarantined": [["d:3", 0, "engines die of it"]],
        },
        "cursor": {"row": 60},
        "difficulty": None,
    }
    pipeline = make_pipeline(staleness=staleness)
    asyncio.run(pipeline.load_state(json.loads(json.dumps(state)), 4))
    run = drive(pipeline)
    assert run.state() == state
    assert run.admit(4 - staleness) == 2
    assert [(row, attempt) for row, attempt, *_ in engine(run).asked] == [(40, 1), (41, 1)]
    assert rows(run.batch(4)) == [40, 41]
    assert [run.admit(version - staleness) for version in (5, 6)] == [2, 3]
    assert rows(run.batch(5)) == [50, 51]
    assert rows(run.batch(6)) == [60, 61, 62]


def test_a_retry_repeats_the_seed_and_a_refused_prompt_is_dropped_with_its_reason(drive):
    slow = {"reason": "no answer in time", "retryable": True}
    run = drive({0: [slow], 1: [{"reason": "too long"}], 2: [slow, slow]})
    run.admit(0)
    batch = run.batch(0)
    assert rows(batch) == [0]
    assert batch.dropped == 2
    assert dropped(run) == {"too long": 1, "no answer in time": 1}
    first, second = engine(run).seeds(0)
    assert first == second
    assert len(engine(run).seeds(2)) == 2


def test_a_batch_of_nothing_ends_the_run_with_the_reason(drive):
    run = drive({r: [{"reason": "broken image"}] for r in range(3)})
    run.admit(0)
    with pytest.raises(RunError, match="broken image"):
        run.batch(0)


def test_silence_ends_by_a_limit_and_says_who_is_awaited(monkeypatch, drive):
    monkeypatch.setattr("saccade.pipeline.rollouts.POLL_SECONDS", 0.01)
    run = drive(dispatcher={"group_timeout": -60.0, "reward_timeout": 0.01})
    run.pipeline.dispatcher.rewards = Pool([FakeRewards(held=[1])])
    run.admit(0)
    with pytest.raises(RunError, match=r"waited 0.02 s for 1 of 3 groups in flight \(first: d:1 .*cluster.timeout"):
        run.batch(0)


def test_what_went_before_a_wait_is_no_silence(drive):
    """An update may take longer than a group is waited for."""
    run = drive(dispatcher={"group_timeout": 1.0, "reward_timeout": 1.0})
    run.pipeline.dispatcher.rewards = Pool([rewards := FakeRewards(held=[1])])
    run.admit(0)
    run.pipeline.progress = -1e9
    with pytest.raises(TimeoutError):
        run.batch(0, 0.01)
    rewards.release(1)
    assert rows(run.batch(0)) == [0, 1, 2]


def test_stopping_leaves_everything_outstanding(drive):
    def stop() -> None:
        raise RunStopped

    run = drive(dispatcher={"check_stop": stop})
    run.admit(0)
    with pytest.raises(RunStopped):
        run.batch(0)
    assert [r.row for _, r in run.groups.outstanding()] == [0, 1, 2]


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_without_a_gradient_are_replaced_in_their_places(staleness, drive):
    run = drive(flat={0, 2, 3}, refill=5, staleness=staleness)
    run.admit(1 - staleness)
    batch = run.batch(0)  # rows 0 and 2 are flat; 6 and 7 come for them
    assert rows(batch) == [6, 1, 7] and batch.replaced == 2 and batch.dropped == 0
    assert dropped(run) == {"its scores are all equal (algorithm.refill)": 2}
    assert [r.row for b, r in run.groups.outstanding() if b == 0] == [1, 6, 7]
    assert rows(run.batch(1)) == [8, 4, 5]
    starts = [together for *_, together in engine(run).asked]
    assert starts[6:] == ([Together("3", 2)] * 2 + [Together("4", 1)] if staleness == 0 else [None] * 3)


def test_replacements_are_bounded_and_then_flat_groups_stay(drive):
    run = drive(flat=set(range(10)), refill=4)
    run.admit(0)
    batch = run.batch(0)  # three replaced by 3, 4, 5, one of those by 6
    assert rows(batch) == [6, 4, 5] and batch.replaced == 4


def test_a_replacement_that_fails_is_given_up_with_its_reason(drive):
    run = drive({3: [{"reason": "too long"}]}, flat={0}, refill=3)
    run.admit(0)
    batch = run.batch(0)
    assert rows(batch) == [1, 2] and (batch.replaced, batch.dropped) == (1, 1)


def test_a_group_without_scores_is_replaced_under_that_name(drive):
    run = drive(flat={2}, slow={0}, refill=3)
    run.admit(0)
    assert rows(run.batch(0)) == [3, 1, 4]
    assert dropped(run) == {
        "timeout: no score in 60 s": 1,
        "its scores are all equal (algorithm.refill)": 1,
    }


def test_rewards_that_fail_for_replacements_end_the_run_too(drive):
    run = drive(flat={0, 1}, slow={3, 4}, refill=9, max_failed_share=0.5)
    run.admit(0)
    with pytest.raises(RunError, match=r"failed for 4 of 6 completions(.|\n)*no score in 60 s"):
        run.batch(0)


def test_prompts_that_are_too_easy_or_too_hard_are_passed_over(drive):
    difficulty = Difficulty(0.2, 0.8)
    summary = GroupSummary(PromptRef("d:1"), (1.0, 1.0, 0.0), (True, True, False), {}, (1,) * 3, ("stop",) * 3, 2, 0)
    difficulty.observe(summary)  # 1 of what was scored: always right
    restored = Difficulty(0.2, 0.8)
    restored.load_state(json.loads(json.dumps(difficulty.state())))
    run = drive(difficulty=restored)
    run.admit(0)
    assert rows(run.batch(0)) == [0, 2, 3]
    assert restored.passed_over == 1
    assert restored.admits(PromptRef("d:0", epoch=1))  # rewards 0 and 1: half
    assert restored.admits(PromptRef("d:9"))


def test_when_no_prompt_is_worth_it_the_run_says_so(drive):
    class Never(Difficulty):
        def admits(self, ref: PromptRef) -> bool:
            return False

    run = drive(difficulty=Never(0.0, 0.5), prompts_per_step=1)
    run.admit(0)
    with pytest.raises(RunError, match=r"1001 prompts in a row.*reward_range"):
        run.batch(0)


@pytest.mark.parametrize(("oldest", "version", "allowed"), [(3, 3, 0), (2, 3, 1), (3, 4, 1)])
def test_staleness_within_bounds_is_measured(oldest, version, allowed):
    assert checked_lag(summaries(oldest), version, allowed) == version - oldest


@pytest.mark.parametrize(("oldest", "version", "allowed"), [(2, 3, 0), (1, 3, 1), (4, 3, 1)])
def test_staleness_out_of_bounds_is_an_error(oldest, version, allowed):
    with pytest.raises(AssertionError, match=f"its lag is {version - oldest}"):
        checked_lag(summaries(oldest), version, allowed)


def summaries(oldest: int) -> list[GroupSummary]:
    newest = GroupSummary(PromptRef("a"), (1.0,), (True,), {}, (1,), ("stop",), 2, oldest + 1)
    stale = GroupSummary(PromptRef("b"), (1.0,), (True,), {}, (1,), ("stop",), 2, oldest)
    return [newest, stale] if oldest < 3 else [stale]
