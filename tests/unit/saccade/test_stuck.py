"""Ten stalls, each named right: by `why` from the status that a run's own parts give."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from saccade.fleet.pool import EnginePool, Member, MemberState, Pool
from saccade.fleet.probe import silent
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.evaluate import Evaluator
from saccade.pipeline.stuck import Status, why
from saccade.watchdog import Watchdog, snapshot
from tests.helpers.fake_fleet import Driven, FakeEngine, FakeRewards, done, make_pipeline, stored

STUCK = 60.0


class Held(FakeEngine):
    """An engine of which nothing is heard."""

    def has_answered(self, group: Any) -> bool:
        return False


class Stuck:
    """A run of which nothing goes on since STUCK seconds, in a phase of its step."""

    def __init__(self, tmp_path: Any, doing: str = "rollout", held: tuple[int, ...] = (), **given: Any) -> None:
        self.pipeline = make_pipeline(**given)
        self.rewards = FakeRewards(held=list(held))
        self.pipeline.dispatcher.pool = EnginePool([FakeEngine(name="rollout-0"), Held(name="rollout-1")])
        self.pipeline.dispatcher.rewards = Pool([self.rewards])
        self.driven = Driven(self.pipeline)
        self.run: Any = SimpleNamespace(
            version=3,
            config=SimpleNamespace(steps=9),
            doing=(doing, STUCK),
            directory=tmp_path,
            rollouts=self.pipeline,
            actors=SimpleNamespace(
                engines=self.pipeline.dispatcher.pool, rewards=self.pipeline.dispatcher.rewards, data=Pool([])
            ),
        )

    def admit(self) -> None:
        self.driven.admit(0)
        for group in self.pipeline.groups.all():
            group.since -= STUCK
        self.pipeline.progress -= STUCK

    def status(self, **known: Any) -> Status:
        self.pipeline.progress = min(self.pipeline.progress, self.pipeline.progress - STUCK)
        return Status.of(replace(snapshot(self.run), **known).to_dict())


@pytest.fixture
def stuck(tmp_path):
    made: list[Stuck] = []

    def make(*given: Any, **known: Any) -> Stuck:
        made.append(Stuck(tmp_path, *given, **known))
        return made[-1]

    yield make
    for one in made:
        one.driven.close()


def first(status: Status) -> str:
    return why(status).splitlines()[0]


def test_a_hung_engine_is_named_with_its_group(stuck):
    run = stuck(held=(1,))
    run.admit()
    status = run.status(silent=("rollout-1",))
    assert first(status) == "rollout-1 does not answer: stopped, or hangs"
    assert "the oldest group: d:1 (epoch 0, attempt 0) waits for rollout-1 (generating) for 60 s" in why(status)
    assert first(run.status()) == "d:1 (epoch 0, attempt 0) waits for rollout-1 (generating) for 60 s"


def test_a_hung_reward_is_named(stuck):
    run = stuck(held=(0,))
    run.admit()
    run.pipeline.groups.all()[0].scorer.node = "0123456789abcdef"
    text = "d:0 (epoch 0, attempt 0) waits for reward-0 (scoring) on node 01234567 for 60 s"
    assert first(run.status()) == text
    assert first(run.status(silent=("reward-0",))) == "reward-0 does not answer: stopped, or hangs"


def test_a_stopped_rank_and_a_learner_at_work_are_told_apart(stuck):
    run = stuck("learn")
    assert first(run.status(silent=("learner rank 1",))) == "learner rank 1 does not answer: stopped, or hangs"
    assert first(run.status()) == "the learner computes the update of step 4 for 60 s"


def test_a_sync_that_waits_for_an_engine_names_it(stuck):
    run = stuck("sync")
    status = run.status(silent=("rollout-0",))
    assert first(status) == "rollout-0 does not answer: stopped, or hangs"
    assert "step 4 of 9: sync for 60 s; nothing began or ended for 60 s" in why(status)


def test_an_evaluation_is_judged_by_its_own_groups(stuck):
    run = stuck("evaluate", held=(7,))
    evaluator = Evaluator([(stored(row), "all") for row in (6, 7)], run.pipeline.dispatcher)
    run.run.evaluator = evaluator

    async def story() -> tuple[Status, Status]:
        evaluating = asyncio.create_task(evaluator.run())
        for _ in range(50):
            await asyncio.sleep(0)
        goes_on = run.status()
        for group in evaluator.groups.all():
            group.since -= STUCK
        stands = run.status()
        run.rewards.release(7)
        await evaluating
        return goes_on, stands

    goes_on, stands = run.driven._runner.run(story())
    assert first(goes_on) == "the run goes on" and goes_on.groups == {"issued": 1, "scored": 1, "sealed": 0}
    assert first(stands) == "d:7 (epoch 0, attempt 0) waits for rollout-1 (generating) for 60 s"


def test_a_place_in_the_cluster_that_is_awaited_is_named(stuck):
    run = stuck()
    pool = run.pipeline.dispatcher.pool
    for member in pool.members:
        pool.enter(member, MemberState.DEAD)
        member.remark = "its replacement waits for a place in the cluster"
        member.since -= STUCK
    run.admit()
    status = run.status()
    text = "is dead for 60 s (its replacement waits for a place in the cluster)"
    assert first(status) == f"awaited: rollout-0 {text}; rollout-1 {text}"
    assert "d:0 (epoch 0, attempt 0) waits for an engine to serve for 60 s" in why(status)


def test_a_full_object_store_is_named_with_its_node(stuck):
    run = stuck(held=(1,))
    run.admit()
    status = run.status(stores={"10.0.0.1": 0.2, "10.0.0.2": 0.97})
    assert first(status).startswith("the object store is full on 10.0.0.2 (97%)")


class Nothing(Difficulty):
    """Admits no prompt."""

    def admits(self, ref: Any) -> bool:
        return False


def test_data_that_the_filters_exhaust_are_named(stuck):
    run = stuck(difficulty=Nothing(0.0, 0.5))
    stream, data = run.pipeline.prompts, run.pipeline.prompts.data.actors[0]
    take, answers, late = data.take, [True, True, False], Future()
    data.take = lambda n: take(n) if answers.pop(0) else late
    run.admit()
    assert stream.passed_over == 6
    stream._asked -= STUCK
    text = "the data actor was asked 60 s ago; 6 in a row are outside algorithm.reward_range"
    assert first(run.status()) == f"the next prompts are awaited: {text}"
    late.set_exception(RuntimeError("over"))


def test_a_closed_staleness_gate_is_named(stuck):
    run = stuck(held=(1,), windowed=True, staleness=1)
    run.admit()
    for group in run.pipeline.groups.unsealed():
        group.late = group.ref.row == 1
    status = run.status()
    assert status.enough_scored
    assert first(status) == (
        "d:1 (epoch 0, attempt 0) waits for rollout-1 (generating) for 60 s, which was too old once: the batch is not "
        "sealed without it"
    )
    nothing = stuck()
    assert first(nothing.status()).startswith("no group is in flight, and none is due: the staleness gate is closed")


def test_a_full_disk_is_named(stuck):
    run = stuck("checkpoint")
    assert first(run.status(disk_free=2**20)) == "the disk of output_dir is full: 1 MiB are free"
    assert first(run.status(disk_free=2**40)) == "a checkpoint is written for 60 s"


def test_a_blocked_driver_is_named_with_the_line_where_it_stands(stuck, monkeypatch):
    monkeypatch.setattr("saccade.watchdog.ANSWER_SECONDS", 0.05)
    run, release, seen = stuck().run, threading.Event(), []

    async def driver() -> None:
        watchdog = Watchdog(run, None, 60.0)
        looking = threading.Thread(target=lambda: (seen.append(watchdog.look()), release.set()))
        looking.start()
        release.wait()  # blocks the loop
        looking.join()

    asyncio.run(driver())
    assert "the driver itself is blocked: its event loop has not answered" in first(seen[0])
    assert "threading.py" in first(seen[0])


def test_a_driver_that_stays_blocked_is_said_once(stuck, monkeypatch):
    for name in ("LOOK_SECONDS", "ANSWER_SECONDS"):
        monkeypatch.setattr(f"saccade.watchdog.{name}", 0.01)
    run, release, said, told = stuck().run, threading.Event(), [], []
    run.display = SimpleNamespace(phase=said.append)

    def remote(status: dict) -> Any:
        told.append(status)
        if len(told) == 5:
            release.set()
        return SimpleNamespace(future=lambda: done(None))

    async def driver() -> None:
        watchdog = Watchdog(run, SimpleNamespace(exchange=SimpleNamespace(remote=remote)), 1e9)
        watchdog.start()
        release.wait()  # blocks the loop
        watchdog.end()
        watchdog.join()

    asyncio.run(driver())
    assert all(status["blocked"] for status in told) and len(said) == 1


def test_a_status_that_cannot_be_taken_is_no_blocked_driver(stuck, monkeypatch):
    run = stuck().run
    monkeypatch.setattr("saccade.watchdog.snapshot", lambda run: 1 / 0)

    async def driver() -> None:
        await asyncio.to_thread(Watchdog(run, None, 60.0).look)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(driver())


def test_a_run_that_goes_on_is_not_called_stuck(stuck):
    run = stuck(held=(1,))
    run.driven.admit(0)
    assert why(snapshot(run.run)).splitlines()[0] == "the run goes on"


def test_who_is_silent_has_not_answered_and_who_is_dead_has():
    dead: Future[None] = Future()
    dead.set_exception(RuntimeError("dead"))
    assert silent({"a": done(None), "b": Future(), "c": dead}, 0.01) == ["b"]


def test_the_watchdog_tells_the_desk_and_the_user_once_and_scales_as_asked(stuck, monkeypatch):
    monkeypatch.setattr("saccade.watchdog.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("saccade.watchdog.store_shares", dict)
    one = stuck(held=(1,))
    one.admit()
    run, said, scaled, wanted = one.run, [], [], [5, None, None]
    run.display = SimpleNamespace(phase=said.append)
    run.actors.scale, run.actors.health = scaled.append, dict
    told: list[dict] = []

    class Call:
        def remote(self, status: dict) -> Any:
            told.append(status)
            return SimpleNamespace(future=lambda: done(wanted.pop(0) if wanted else None))

    async def driver() -> None:
        watchdog = Watchdog(run, SimpleNamespace(exchange=Call()), 5.0)
        watchdog.start()
        async with asyncio.timeout(30):
            while len(told) < 5:
                await asyncio.sleep(0.001)
        watchdog.end()
        watchdog.join()

    asyncio.run(driver())
    assert scaled == [5] and told[0]["step"] == 3
    assert len(said) == 1 and said[0].startswith("no progress: d:1 (epoch 0, attempt 0) waits for rollout-1")


def test_a_member_that_drains_is_not_awaited():
    pool: EnginePool = EnginePool([FakeEngine(name="a")])
    pool.put(Member(1, FakeEngine(name="b"), MemberState.DRAINING))
    assert pool.describe() == []
