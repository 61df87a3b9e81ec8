"""Windowed admission: a long completion holds nobody up, nothing too old is trained, and no prompt is lost for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade.errors import RunError
from saccade.fleet.pool import Pool
from saccade.pipeline.admission import Windowed, checked_lag
from saccade.pipeline.groups import DropReason, Group, GroupBuffer, State
from saccade.pipeline.sealed_batch import SealedBatch
from tests.helpers.fake_fleet import Driven, FakeEngine, FakeRewards, make_pipeline

B = 3


class Windows:
    """A windowed pipeline of three prompts a step, with rows whose scores come when a test says so."""

    def __init__(self, staleness: int = 1, batches: int = 99, held: tuple[int, ...] = (), **given: object) -> None:
        script, flat, slow = (given.pop(name, ()) for name in ("script", "flat", "slow"))
        pipeline = make_pipeline(script or {}, windowed=True, staleness=staleness, batches=batches, **given)
        self.rewards = FakeRewards(flat, slow, held=list(held))
        pipeline.dispatcher.rewards = Pool([self.rewards])
        self.engine: FakeEngine = pipeline.dispatcher.pool.members[0].actor
        self.run, self.version = Driven(pipeline), 0
        self.run.admit(0)

    def step(self) -> list[int]:
        """Train the next batch; returns its rows."""
        batch = self.run.batch(self.version)
        checked_lag(batch.summaries, self.version, self.run.pipeline.admission.max_staleness)
        self.run.pipeline.book(batch, ())
        self.version += 1
        self.engine.version = self.version
        self.run.admit(self.version)
        return rows(batch)


def rows(batch: SealedBatch) -> list[int]:
    return [s.ref.row for s in batch.summaries]


@pytest.fixture
def made() -> Iterator[list[Windows]]:
    found: list[Windows] = []
    yield found
    for one in found:
        one.run.close()


def windows(made: list[Windows], **given: object) -> Windows:
    made.append(Windows(**given))  # type: ignore[arg-type]
    return made[-1]


def test_the_first_groups_that_are_scored_make_the_batch(made):
    run = windows(made, held=(1,))
    assert run.step() == [0, 2, 3]
    run.rewards.release(1)
    run.run.settle()
    assert run.step() == [1, 4, 5]  # oldest first: 6, 7 and 8 are newer
    assert run.step() == [6, 7, 8]


def test_what_is_too_old_is_dropped_and_its_prompt_issued_again_and_waited_for(made):
    run = windows(made, held=(1,))
    assert [run.step(), run.step()] == [[0, 2, 3], [4, 5, 6]]
    run.rewards.release(1)  # sampled by version 0, which may be trained at version 1 at the latest
    run.run.settle()
    assert run.step() == [7, 8, 9]
    assert run.run.groups.dropped == {(DropReason.STALE, ""): 1}
    assert [attempt for row, attempt, *_ in run.engine.asked if row == 1] == [0, 1]
    # It was issued again at version 2: the batch of version 3 is not sealed without it.
    again = next(g for g in run.run.groups.unsealed() if g.ref.row == 1)
    assert (again.late, again.version) == (True, 2)
    assert run.run.pipeline._seal(3) is None
    run.rewards.release(1)
    run.run.settle()
    assert run.step() == [1, 10, 11]


def test_the_place_of_a_group_that_was_given_up_goes_to_another_prompt(made):
    slow = {"reason": "no answer in time", "retryable": True}
    run = windows(made, script={0: [slow], 1: [{"reason": "too long"}], 4: [slow, slow]}, slow=[5])
    assert [run.step(), run.step()] == [[0, 2, 3], [6, 8, 7]]  # row 4 had two attempts
    assert run.run.groups.dropped == {
        (DropReason.FAILED, "too long"): 1,
        (DropReason.FAILED, "no answer in time"): 1,
        (DropReason.UNSCORED, "timeout: no score in 60 s"): 1,
    }


def test_groups_without_a_gradient_are_replaced_as_they_end_within_the_bound(made):
    run = windows(made, flat=range(5), refill=3)
    assert [run.step(), run.step()] == [[3, 4, 5], [6, 7, 8]]  # three were replaced, the next two were not
    assert run.run.groups.dropped == {(DropReason.NO_SIGNAL, ""): 3}


def test_a_run_that_no_prompt_gets_through_ends(made):
    run = windows(made, script={row: [{"reason": "broken image"}] for row in range(999)})
    with pytest.raises(RunError, match=r"no batch comes together: .* broken image"):
        run.step()


def test_rewards_that_fail_altogether_end_the_run_before_its_prompts_are_gone(made):
    run = windows(made, slow=range(999), max_failed_share=0.5)
    with pytest.raises(RunError, match=r"the rewards failed for 4 of 6 completions"):
        run.step()
    assert sum(run.run.groups.dropped.values()) == 1  # within the share; the others are outstanding
    assert len(run.run.groups.outstanding()) == 6


def test_the_last_batches_are_those_that_are_left(made):
    run = windows(made, staleness=2, batches=3, held=(0,))
    assert run.step() == [1, 2, 3]
    assert run.step() == [4, 5, 6]
    assert len(run.engine.asked) == 9
    run.rewards.release(0)
    run.run.settle()
    assert run.step() == [0, 7, 8]
    assert run.run.groups.outstanding() == [] and run.run.groups.trained == 9


def test_a_resume_fills_up_what_was_overtaken(made):
    run = windows(made, held=(1, 5))
    run.step()
    state = run.run.state()
    assert sorted(e["ref"]["row"] for e in state["ledger"]["outstanding"]) == [1, 4, 5, 6, 7, 8]
    pipeline = make_pipeline(windowed=True, staleness=1)
    asyncio.run(pipeline.load_state(state, 1))
    again, engine = Driven(pipeline), pipeline.dispatcher.pool.members[0].actor
    engine.version = 1
    again.admit(1)
    assert sorted(row for row, *_ in engine.asked) == [1, 4, 5, 6, 7, 8]
    assert [rows(again.batch(1)), rows(again.batch(2))] == [[1, 4, 5], [6, 7, 8]]
    again.close()


def test_a_strict_run_goes_on_where_a_windowed_one_was(made):
    run = windows(made, held=(1, 5))
    run.step()
    pipeline = make_pipeline(staleness=0)
    asyncio.run(pipeline.load_state(run.run.state(), 1))
    again, engine = Driven(pipeline), pipeline.dispatcher.pool.members[0].actor
    again.admit(1)
    first = rows(again.batch(1))
    again.admit(2)
    assert [first, rows(again.batch(2))] == [[1, 4, 5], [6, 7, 8]]
    again.admit(3)
    assert rows(again.batch(3)) == [9, 10, 11]
    assert len(engine.asked) == 9
    again.close()


def test_fewer_places_after_a_resume_hold_nothing_up_for_ever(made):
    """Late groups that a smaller bound puts behind others are not waited for before they were sent."""
    run = windows(made, staleness=2, held=(0,))
    for _ in range(3):
        run.step()
    run.rewards.release(0)
    run.run.settle()
    run.step()
    state = run.run.state()
    assert [entry["ref"]["row"] for entry in state["ledger"]["outstanding"] if entry["late"]] == [0]
    pipeline = make_pipeline(windowed=True, staleness=1)
    asyncio.run(pipeline.load_state(state, 4))
    again, engine = Driven(pipeline), pipeline.dispatcher.pool.members[0].actor
    trained: list[int] = []
    for version in (4, 5, 6):
        engine.version = version
        again.admit(version)
        trained += rows(again.batch(version))
    assert 0 in trained
    again.close()


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_prompt_is_trained_once_within_the_bound_whoever_is_slow(size: int, staleness: int, data: st.DataObject):
    """Over any order in which groups end: the policy alone, its late groups waited for and trained."""
    steps = 8
    policy, groups = Windowed(staleness, steps, size), GroupBuffer()
    trained, issued, dropped = Counter[int](), 0, Counter[int]()

    def score(group: Group, version: int) -> None:
        group.summary = GroupSummary(group.ref, (1.0, 0.0), (True, True), {}, (1, 1), ("stop",) * 2, 2, group.version)
        groups.score(group)

    for version in range(steps):
        for batch in policy.due(groups, version):
            for group in groups.issue(batch, [prompt(issued + i) for i in range(size)]):
                group.version = version
            issued, groups.next_batch = issued + size, batch + 1
        while True:
            for group in policy.stale(groups, version):
                assert not group.late, "a prompt that was waited for is trained at its second attempt"
                groups.drop(group.ref, DropReason.STALE)
                dropped[group.ref.row] += 1
                (again,) = groups.issue(group.batch, [StoredPrompt(group.ref.retry(), None)], [group.slot], late=True)
                again.version = version
            if (found := policy.ready(groups, version)) is not None:
                break
            running = [g for g in groups.unsealed() if g.state is State.ISSUED]
            assert running, "whoever waits waits for somebody"
            score(data.draw(st.sampled_from(running)), version)
        assert len(found) == size
        assert checked_lag([g.summary for g in found], version, staleness) <= staleness
        groups.seal(version, found)
        for group in found:
            groups.train(group.ref)
            trained[group.ref.row] += 1
    assert trained == Counter(range(steps * size)) and groups.outstanding() == []


def prompt(row: int) -> StoredPrompt:
    return StoredPrompt(PromptRef(f"d:{row}", 0, 0, row), None)


def test_late_groups_that_cannot_all_be_trained_in_time_are_waited_for_before_their_last_step():
    """Two batches of late groups with one bound: the first of them goes into the step before it."""
    policy, groups = Windowed(2, 9, 1), GroupBuffer()
    groups.next_batch = 3
    for row in (0, 1):
        (late,) = groups.issue(row, [prompt(row)], late=True)
        late.version = 0
    (new,) = groups.issue(2, [prompt(2)])
    new.version = 1
    new.summary = SimpleNamespace(oldest_version=1)  # type: ignore[assignment]
    groups.score(new)
    assert policy.ready(groups, 0) == [new]  # steps 1 and 2 are left for the two
    assert policy.ready(groups, 1) is None
