"""What meets what: losses while weights are sent, while a learner is replaced, while places are filled. No Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from learner.types import LearnerError, LearnerTimeoutError
from saccade.errors import RunError
from saccade.fleet.deaths import DeathError, learner_lost
from saccade.fleet.head import HeadLostError
from saccade.fleet.keeper import overslept
from saccade.fleet.pool import EnginePool, Member, MemberState, Pool
from saccade.loop import step
from saccade.pipeline.difficulty import Difficulty
from saccade.pipeline.evaluate import Evaluator
from saccade.pipeline.held_out import HeldOut
from saccade.pipeline.prompt_stream import PromptStream
from saccade.run import Run
from tests.helpers.fake_fleet import (
    FakeData,
    FakeEngine,
    FakeLearner,
    FakeRewards,
    done,
    make_dispatcher,
    make_pipeline,
    stored,
)
from tests.unit.saccade.test_keeper import Broken, Kept, fleet_of, states, turns
from tests.unit.saccade.test_loop import make_run, trained
from weight_sync.verify import WeightSyncError

# ---------------------------------------------------------------------------------------------------- places


def test_who_is_lost_while_nobody_is_kept_is_replaced_once_when_the_run_goes_on():
    pool: EnginePool = EnginePool([FakeEngine(name="a")])
    kept = Kept(pool)
    keeper = kept.keeper()

    async def story() -> None:
        async with keeper.running():
            await turns()
        pool.lose(pool.members[0], "killed")  # in the sync after a learner was replaced
        await turns()
        assert kept.made == []
        async with keeper.running():
            await turns()

    asyncio.run(story())
    assert len(kept.made) == 1 and states(pool) == ["serving"]


def test_a_place_that_is_waited_for_is_filled_once_however_often_it_is_asked_for():
    pool: EnginePool = EnginePool([FakeEngine(name="a")])
    kept, room = Kept(pool), asyncio.Event()
    keeper = kept.keeper()
    make, asked = keeper._create, []

    async def create(place: int, avoid: Any) -> Any:
        asked.append(place)
        await room.wait()
        return await make(place, avoid)

    keeper._create = create

    async def story() -> None:
        async with keeper.running():
            for _ in range(2):
                keeper.scale(2)
                await turns()
            assert asked == [1]
        async with keeper.running():  # the run began anew: the second engine is wanted still
            room.set()
            await turns()

    asyncio.run(story())
    assert len(kept.made) == 1 and states(pool) == ["serving", "serving"]


def test_a_place_that_is_not_wanted_any_more_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("saccade.fleet.keeper.POLL_SECONDS", 0.001)
    pool: EnginePool = EnginePool([FakeEngine(name="a"), FakeEngine(name="b")])
    left: list[int] = []
    keeper = Kept(pool).keeper(leave=left.append)

    async def create(place: int, avoid: Any) -> Any:
        await asyncio.Event().wait()

    keeper._create = create

    async def story() -> None:
        async with keeper.running(), asyncio.timeout(30):
            pool.lose(pool.members[1], "its node is gone")
            keeper.scale(3)
            await turns()
            assert states(pool) == ["serving", "dead"]
            keeper.scale(1)
            while len(left) < 2:
                await asyncio.sleep(0.001)
            keeper.check()

    asyncio.run(story())
    assert sorted(left) == [1, 2] and [m.name for m in pool.members] == ["a"]


def test_silence_while_the_driver_itself_was_stopped_says_nothing():
    now = time.monotonic()
    assert overslept(now - 400.0, 300.0) and not overslept(now - 301.0, 300.0)


def test_an_engine_that_leaves_while_weights_are_sent_is_no_loss():
    error = WeightSyncError("receiving the weights", ("b",), "its connection closed")
    fleet, learner, kept = fleet_of("a", "b", fails_at=(error,))
    keeper = kept.keeper(join=fleet.join)
    sending = learner.send_weights

    async def story() -> None:
        loop, second = asyncio.get_running_loop(), fleet.pool.members[1]

        def send() -> Any:
            learner.send_weights = sending
            asyncio.run_coroutine_threadsafe(ended(), loop).result()
            return sending()

        async def ended() -> None:
            keeper.scale(1)
            await turns()

        learner.send_weights = send
        async with keeper.running():
            await fleet.sync(1)
            assert second.state is MemberState.DEAD

    asyncio.run(story())
    assert [m.name for m in fleet.pool.members] == ["a"] and fleet.pool.members[0].version == 1
    assert keeper.lost == 0 and learner.sent == [["a", "b"], ["a"]]


def test_one_that_serves_is_hope_whatever_its_place_has_seen():
    pool: EnginePool = EnginePool([FakeEngine(name="a"), FakeEngine(name="b")])
    kept = Kept(pool, make=lambda name: Broken(name=name))
    keeper = kept.keeper()
    keeper._failures[1] = 9

    async def story() -> None:
        async with keeper.running():
            pool.lose(pool.members[0], "gone")
            await turns()
            keeper.check()

    asyncio.run(story())
    assert states(pool) == ["dead", "serving"]


def test_who_waits_for_a_member_learns_that_none_will_come():
    pool: Pool = Pool([FakeData()])
    kept = Kept(pool, make=lambda name: BrokenData())
    stream = PromptStream(pool, 5.0)

    async def story() -> None:
        async with kept.keeper().running(), asyncio.timeout(30):
            pool.lose(pool.members[0], "killed")
            await stream.read([])

    with pytest.raises(RunError, match=r"data failed 3 times in a row, .* no file"):
        asyncio.run(story())


class BrokenData(FakeData):
    def start(self) -> Future[None]:
        call: Future[None] = Future()
        call.set_exception(RuntimeError("no file"))
        return call


# ---------------------------------------------------------------------------------------------------- weights


def test_an_engine_that_joins_behind_an_update_gets_its_weights_as_the_next_version(tmp_path):
    run = make_run(tmp_path, 0)
    learner: Any = run.learner
    whole, begun, go_on = learner.update, threading.Event(), threading.Event()

    def update(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return whole(*given)

    learner.update = update

    async def story() -> None:
        late = Member(1, FakeEngine(name="late"))
        async with run.rollouts.running():
            stepping = asyncio.create_task(step(run, run.config))
            await asyncio.to_thread(begun.wait, 30)
            run.fleet.pool.put(late)
            joining = asyncio.create_task(run.fleet.join(late))
            await turns()
            held: list[int] = []
            late.actor.commit = lambda version: done(held.append(version))
            go_on.set()
            await asyncio.gather(stepping, joining)
        assert held == [1, 1], "the learner had the weights of version 1 when it joined"

    asyncio.run(story())


def test_the_learners_turn_ends_with_the_transfer_also_where_nobody_waits_for_it():
    fleet, learner, _ = fleet_of("a")
    sending, begun, go_on = learner.send_weights, threading.Event(), threading.Event()

    def send() -> Any:
        begun.set()
        assert go_on.wait(30)
        return sending()

    learner.send_weights = send

    async def story() -> None:
        late = Member(1, FakeEngine(name="late"))
        fleet.pool.put(late)
        joining = asyncio.create_task(fleet.join(late))
        await asyncio.to_thread(begun.wait, 30)
        joining.cancel()
        await turns()
        assert fleet.turn.locked()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await joining
        assert not fleet.turn.locked() and late.state is MemberState.SERVING

    asyncio.run(story())


# ---------------------------------------------------------------------------------------------------- learner


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (LearnerTimeoutError("still running: rank 1"), True),
        (DeathError({"learner rank 1": " (killed)"}, "a closed connection"), True),
        (DeathError({"engine rollout-0": " (killed)"}, "a closed connection"), False),
        (LearnerError("rank 0 failed: CUDA out of memory"), False),
        (RunError("no batch comes together"), False),
    ],
)
def test_which_errors_mean_that_a_learner_is_lost(error, lost):
    assert learner_lost(error) is lost


def died() -> LearnerError:
    error = LearnerError("learner rank 0 died while loading the model")
    error.__cause__ = ray.exceptions.RayActorError()
    return error


def recovering(directory: Path, renewals: list[Exception | None]) -> tuple[Run, list[str]]:
    """A run whose learner is replaced as `renewals` say."""
    run, said = make_run(directory, 1), []
    run.display = SimpleNamespace(phase=said.append, step=lambda record, steps: None)  # type: ignore[assignment]
    run.head = SimpleNamespace(gone=lambda: False)  # type: ignore[assignment]
    actors: Any = run.actors

    async def renew(say: Any) -> None:
        if (error := renewals.pop(0)) is not None:
            raise error
        actors.learner = FakeLearner(run.fleet.pool.actors)

    actors.renew_learner, actors.questions = renew, dict
    return run, said


async def one_step(run: Run) -> None:
    async with run.rollouts.running():
        await step(run, run.config)


def test_a_learner_that_is_lost_while_it_starts_is_replaced_too(tmp_path):
    run, _ = recovering(tmp_path, [died(), None])

    async def story() -> None:
        await one_step(run)
        assert await run.recover(LearnerTimeoutError("still running: rank 0"))
        await one_step(run)

    asyncio.run(story())
    assert run.version == 2 and [row for row, _ in trained(run)] == [3, 5], "row 4 is too long"
    assert run.rollouts.groups.trained == 5


def test_a_learner_that_hangs_is_replaced_also_while_an_engine_is_dead(tmp_path, monkeypatch):
    run, said = recovering(tmp_path, [None])
    monkeypatch.setattr("saccade.run.explain", lambda *given: DeathError({"engine rollout-0": ""}, "no answer"))
    assert asyncio.run(run.recover(LearnerTimeoutError("still running: rank 0")))
    assert said[0].startswith("the learner was lost and is replaced; there is no checkpoint yet")


def test_no_learner_is_started_where_the_head_of_ray_is_gone(tmp_path, monkeypatch):
    run, said = recovering(tmp_path, [None])
    monkeypatch.setattr("saccade.run.explain", lambda *given: HeadLostError("the head is gone"))
    assert not asyncio.run(run.recover(died())) and said == []


def test_learners_are_not_replaced_for_ever(tmp_path):
    run, _ = recovering(tmp_path, [died(), died(), died(), died()])
    with pytest.raises(LearnerError, match="while loading the model"):
        asyncio.run(run.recover(LearnerTimeoutError("still running: rank 0")))


def test_a_data_actor_that_is_dead_when_a_learner_is_replaced_comes_back_first(tmp_path):
    run, _ = recovering(tmp_path, [None])
    data = run.rollouts.prompts.data
    keeper = Kept(data, make=lambda name: FakeData()).keeper(join=run.rollouts.prompts.renew)

    async def story() -> None:
        async with asyncio.timeout(30), keeper.running():
            await one_step(run)
            data.members[0].actor.kill()
            assert await run.recover(LearnerTimeoutError("still running: rank 0"))
            await one_step(run)

    asyncio.run(story())
    assert [row for row, _ in trained(run)] == [3, 5]


def test_a_data_actor_that_is_lost_at_a_checkpoint_does_not_end_the_run(tmp_path):
    run = make_run(tmp_path, 0)

    def report() -> Any:
        raise RunError("no data actor serves")

    run.actors.data_report = report  # type: ignore[method-assign]
    asyncio.run(one_step(run))
    assert run._saved == 1


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompts_that_were_taken_when_the_rest_did_not_come_are_handed_out_again():
    class Ends(FakeData):
        """Has four rows, of which the first is of no use."""

        def take(self, n: int) -> Any:
            if self.row + n > 4:
                raise RunError("no row is left")
            return super().take(n)

    difficulty = Difficulty(0.2, 0.8)
    difficulty.load_state({"passed_over": 0, "totals": {"d:0": (0.0, 4)}})
    pipeline = make_pipeline(data=Ends(), difficulty=difficulty)
    stream = pipeline.prompts
    with pytest.raises(RunError, match="no row is left"):
        asyncio.run(stream.take(4))
    assert stream.cursor is None, "rows 1, 2 and 3 are in no ledger"


def test_held_out_prompts_are_read_again_by_the_data_actor_that_comes_after():
    class Reads(FakeData):
        first = 0

        def held_out(self, limit: int | None, group_by: str | None) -> Any:
            return done([(stored(row), "all") for row in range(self.first, self.first + (limit or 9))])

    pool: Pool = Pool([Reads()])

    def another(name: str) -> Reads:
        made = Reads()
        made.first = 100
        return made

    kept = Kept(pool, make=another)

    async def story() -> None:
        held = HeldOut(PromptStream(pool, 5.0), 2, None, [(stored(0), "all"), (stored(1), "all")])
        async with kept.keeper().running(), asyncio.timeout(30):
            assert [p.ref.row for p, _ in await held()] == [0, 1]
            pool.members[0].actor.kill()
            assert [p.ref.row for p, _ in await held()] == [100, 101]

    asyncio.run(story())
    assert len(kept.made) == 1


def test_an_evaluation_tries_again_with_prompts_that_were_read_again():
    lost = {"reason": "the owner of its media died", "retryable": True}
    engine = FakeEngine({0: [lost]})
    again = [(stored(0), "all")]
    reads: list[int] = []

    async def held() -> Any:
        reads.append(len(engine.asked))
        return again

    evaluator = Evaluator([(stored(0), "all")], make_dispatcher([engine], [FakeRewards()]), print, held)
    results = asyncio.run(evaluator.run())
    assert reads == [0, 1] and results["d"]["all"]["failed"] == 0.0
    assert [(row, attempt) for row, attempt, *_ in engine.asked] == [(0, 0), (0, 1)]
