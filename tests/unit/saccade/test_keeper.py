"""Who dies or hangs is replaced while the run goes on: pools, keepers, joining with the current weights. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from saccade.errors import RunError
from saccade.fleet.engine_fleet import EngineFleet
from saccade.fleet.keeper import Keeper
from saccade.fleet.pool import EnginePool, Member, MemberState, Pool, Request
from saccade.pipeline.groups import Group
from saccade.pipeline.rollouts import RolloutPipeline
from tests.helpers.fake_fleet import (
    ActorLost,
    Driven,
    FakeData,
    FakeEngine,
    FakeLearner,
    FakeRewards,
    failed,
    make_pipeline,
    stored,
)
from weight_sync.protocols import TransferReport
from weight_sync.verify import WeightMismatchError, WeightReport, WeightSyncError


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass
class Kept:
    """A pool with a keeper, and what the keeper made and said."""

    pool: Pool
    made: list = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    avoided: list[list[str]] = field(default_factory=list)
    make: Callable[[str], object] = lambda name: FakeEngine(name=name)

    def keeper(self, **given: object) -> Keeper:
        names = {member.place: member.name for member in self.pool.members}

        async def create(place: int, avoid: Collection[str]) -> object:
            self.avoided.append(list(avoid))
            self.made.append(self.make(names.get(place, "new")))
            return self.made[-1]

        limits = {"start_timeout": 5.0, "silence": 60.0, "say": self.said.append, **given}
        return Keeper(self.pool, create, **limits)  # type: ignore[arg-type]


def states(pool: Pool) -> list[str]:
    return [str(member.state) for member in pool.members]


def test_who_is_lost_is_killed_and_another_serves_in_its_place():
    pool: EnginePool = EnginePool([FakeEngine(name="a"), FakeEngine(name="b")])
    kept = Kept(pool)
    first = pool.members[0]

    async def story() -> None:
        async with kept.keeper().running():
            pool.lose(first, "killed by signal 9")
            pool.lose(first, "again: nothing changes")
            assert (states(pool), len(pool.serving), first.actor.killed) == (["dead", "serving"], 1, True)
            await turns()

    asyncio.run(story())
    assert states(pool) == ["serving", "serving"] and pool.members[0].actor is kept.made[0]
    assert pool.members[0].node == "here" and [m.name for m in pool.serving] == ["a", "b"]
    assert kept.said == ["a was lost and is replaced: killed by signal 9", "a serves"]


class Silent(FakeEngine):
    """Never answers whether it lives."""

    def check_health(self) -> Future[None]:
        return Future()


class Broken(FakeEngine):
    """Does not start."""

    def start(self) -> Future[None]:
        return failed(RuntimeError("no GPU is free"))


def test_who_does_not_answer_is_lost_unless_it_has_an_excuse():
    pool: EnginePool = EnginePool([Silent(name="a"), FakeEngine(name="b")])
    kept, excuses = Kept(pool), [True, False]
    keeper = kept.keeper(silence=0.01, excused=lambda since: excuses.pop(0))

    async def story() -> None:
        async with keeper.running(), asyncio.timeout(30):
            while not kept.made:
                await asyncio.sleep(0.001)
            await turns()

    asyncio.run(story())
    assert keeper.lost == 1 and excuses == [] and states(pool) == ["serving", "serving"]
    assert "waited 0.01 s for a sign of life of a" in kept.said[0]


def test_a_place_where_nothing_comes_up_is_left_alone_for_a_while_and_the_last_one_ends_the_run():
    pool: EnginePool = EnginePool([FakeEngine(name="a"), FakeEngine(name="b")])
    kept = Kept(pool, make=lambda name: Broken(name=name))
    keeper = kept.keeper()

    async def story() -> None:
        async with keeper.running():
            pool.lose(pool.members[0], "gone")
            await turns()
            keeper.check()
            assert states(pool) == ["dead", "serving"] and len(kept.made) == 2
            assert kept.said[-1] == ("a was lost and is replaced in 60 s: while waiting for a to start: no GPU is free")
            pool.lose(pool.members[1], "gone")
            await turns()
            with pytest.raises(RunError, match=r"b failed 3 times in a row, the last time: .* no GPU is free"):
                keeper.check()

    asyncio.run(story())


def test_deaths_after_work_are_no_failures_in_a_row():
    pool: EnginePool = EnginePool([FakeEngine(name="a")])
    kept = Kept(pool)

    async def story() -> None:
        keeper = kept.keeper()
        async with keeper.running():
            for _ in range(9):
                pool.members[0].groups = 1
                pool.lose(pool.members[0], "killed")
                await turns()
                keeper.check()

    asyncio.run(story())
    assert len(kept.made) == 9 and states(pool) == ["serving"]


def test_a_node_on_which_they_die_again_and_again_is_avoided():
    pool: EnginePool = EnginePool([FakeEngine(name="a"), FakeEngine(name="b")])
    kept = Kept(pool)

    async def story() -> None:
        async with kept.keeper().running():
            await turns()
            for place in (0, 1, 0, 1):
                pool.members[place].groups = 1
                pool.lose(pool.members[place], "killed")
                await turns()

    asyncio.run(story())
    assert kept.avoided == [[], [], ["here"], ["here"]]


def test_scaling_adds_members_and_drains_what_is_too_many():
    pool: EnginePool = EnginePool([FakeEngine(name="a"), FakeEngine(name="b")])
    kept, left = Kept(pool), []
    keeper = kept.keeper(leave=left.append)
    _, second = pool.members

    async def until(what: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not what():
                await asyncio.sleep(0.001)

    async def story() -> None:
        async with keeper.running():
            keeper.scale(4)
            await turns()
            assert states(pool) == ["serving"] * 4 and [m.name for m in pool.members[2:]] == ["new", "new"]
            second.load = 100
            keeper.scale(1)
            assert [m.name for m in pool.serving] == ["a"]
            await until(lambda: len(pool.members) == 2)
            assert left == [2, 3] and states(pool) == ["serving", "draining"] and not second.actor.killed
            keeper.scale(2)
            assert states(pool) == ["serving", "serving"]
            keeper.scale(1)
            pool.lose(second, "killed")  # who dies while it is drained is not replaced
            await turns()

    asyncio.run(story())
    assert [m.name for m in pool.members] == ["a"] and left == [2, 3, 1] and len(kept.made) == 2
    assert kept.said[-1] == "b has left: killed" and keeper.lost == 1


# ---------------------------------------------------------------------------------------------------- weights


class Sync(FakeLearner):
    """Fails at engines as a test says."""

    fails_at: list[Exception]
    sent: list[list[str]]

    def send_weights(self) -> TransferReport:
        self.sent.append([engine.name for engine in self.engines])
        if self.fails_at:
            raise self.fails_at.pop(0)
        return TransferReport({}, {engine.name: WeightReport({}) for engine in self.engines})


def fleet_of(*names: str, fails_at: tuple[Exception, ...] = ()) -> tuple[EngineFleet, Sync, Kept]:
    pool: EnginePool = EnginePool(FakeEngine(name=name) for name in names)
    learner = Sync(())
    learner.fails_at, learner.sent = list(fails_at), []
    return EngineFleet(pool, learner, 5.0), learner, Kept(pool)  # type: ignore[arg-type]


async def until_serving(pool: EnginePool, count: int) -> None:
    async with asyncio.timeout(30):
        while len(pool.serving) < count:
            await asyncio.sleep(0.001)


def test_a_replacement_joins_with_the_current_weights_before_it_serves():
    fleet, learner, kept = fleet_of("a", "b")

    async def story() -> None:
        async with kept.keeper(join=fleet.join).running():
            await fleet.sync(7)
            async with fleet.turn:  # an update is going on
                fleet.pool.lose(fleet.pool.members[0], "killed")
                await turns()
                assert states(fleet.pool) == ["syncing", "serving"] and kept.made[0].version == 0
            await until_serving(fleet.pool, 2)

    asyncio.run(story())
    assert learner.sent == [["a", "b"], ["a", "b"]] and kept.made[0].version == 7
    assert [m.version for m in fleet.pool.members] == [7, 7]


def test_an_engine_that_fails_in_a_sync_is_lost_and_the_others_get_the_weights():
    error = WeightSyncError("receiving the weights", ("a",), "its connection closed")
    fleet, learner, kept = fleet_of("a", "b", fails_at=(error,))

    async def story() -> None:
        async with kept.keeper(join=fleet.join).running():
            await fleet.sync(3)
            assert [m.version for m in fleet.pool.serving] == [3]
            await until_serving(fleet.pool, 2)

    asyncio.run(story())
    assert learner.sent == [["a", "b"], ["b"], ["a", "b"]]
    assert "while receiving the weights: its connection closed" in kept.said[0]


@pytest.mark.parametrize(
    "error",
    [
        WeightSyncError("sending the weights", (), "the learner's fault"),
        WeightMismatchError("comparing", ("a",), "1 differ: lm_head.weight"),
    ],
)
def test_what_would_happen_with_any_engine_ends_the_sync(error):
    fleet, learner, _ = fleet_of("a", "b", fails_at=(error,))
    with pytest.raises(WeightSyncError) as raised:
        asyncio.run(fleet.sync(1))
    assert raised.value is error and states(fleet.pool) == ["serving", "serving"] and len(learner.sent) == 1


def test_a_sync_without_any_engine_is_made_up_for_by_who_joins():
    fleet, learner, kept = fleet_of("a")

    async def story() -> None:
        async with kept.keeper(join=fleet.join).running():
            fleet.pool.lose(fleet.pool.members[0], "killed")
            await fleet.sync(2)
            assert learner.sent == []
            await until_serving(fleet.pool, 1)

    asyncio.run(story())
    assert learner.sent == [["a"]] and fleet.pool.members[0].version == 2


# ---------------------------------------------------------------------------------------------------- groups


def test_routing_by_load_takes_the_engine_with_the_fewest_tokens_left():
    pool: EnginePool = EnginePool([FakeEngine(name=name) for name in "ab"], by_load=True)
    sampling = make_pipeline().dispatcher.sampling  # 2 completions of at most 512 tokens

    def send(*lengths: int) -> list:
        prompts = [stored(row) for row in range(len(lengths))]
        for prompt, length in zip(prompts, lengths, strict=True):
            object.__setattr__(prompt, "length", length)
        return pool.sample([Request(p, 0, 1) for p in prompts], sampling, together=False)

    first = send(1000, 10, 10, 10)
    assert [sent.member.name for sent in first] == ["a", "b", "b", "a"]
    assert [member.load for member in pool.members] == [1000 + 10 + 4 * 512, 20 + 4 * 512]
    for sent in (first[0], first[0]):
        pool.ended(sent)
    assert [member.load for member in pool.members] == [10 + 2 * 512, 20 + 4 * 512]


def driven(**given: object) -> tuple[Driven, Kept, FakeRewards]:
    """A pipeline of three prompts a step, two engines that are replaced, and rewards that hold rows back."""
    pipeline: RolloutPipeline = make_pipeline(**given)  # type: ignore[arg-type]
    pool: EnginePool = EnginePool([FakeEngine(name=name) for name in "ab"])
    rewards = FakeRewards(held=[0, 1, 2])
    pipeline.dispatcher.pool, pipeline.dispatcher.rewards = pool, Pool([rewards])
    return Driven(pipeline), Kept(pool), rewards


def kill(run: Driven, rewards: FakeRewards, member: Member, *rows: int) -> None:
    """Kill an engine while it has these rows."""
    member.actor.kill()
    for row in rows:
        rewards.waiting.pop(row)[0].set_exception(ActorLost(member.actor.id))
    run.settle()


def test_groups_of_a_dead_engine_are_issued_again_elsewhere_with_the_same_seed():
    run, kept, rewards = driven()
    kept.keeper()  # not running: nobody comes back
    run.pipeline.dispatcher.pool.on_loss = lambda member, how: kept.said.append(how)
    run.admit(0)
    a, b = run.pipeline.dispatcher.pool.members
    assert ([asked[0] for asked in a.actor.asked], [asked[0] for asked in b.actor.asked]) == ([0, 2], [1])
    kill(run, rewards, a, 0, 2)
    assert [(row, attempt) for row, attempt, *_ in b.actor.asked] == [(1, 0), (0, 1), (2, 1)]
    assert b.actor.seeds(0) == a.actor.seeds(0) and kept.said == ["The actor died."]
    assert (a.load, b.load > 0) == (0, True)
    for row in (0, 1, 2):
        rewards.release(row)
    assert [s.ref.row for s in run.batch(0).summaries] == [0, 1, 2] and b.load == 0
    run.close()


def test_groups_wait_for_an_engine_where_none_serves():
    run, _, rewards = driven()
    pool = run.pipeline.dispatcher.pool
    pool.on_loss = lambda member, how: None
    run.admit(0)
    kill(run, rewards, pool.members[0], 0, 2)
    kill(run, rewards, pool.members[1], 0, 1, 2)
    assert rewards.waiting == {} and not pool.serving
    pool.put(Member(0, FakeEngine(name="a"), MemberState.SERVING))
    run.settle()
    assert sorted(rewards.waiting) == [0, 1]
    rewards.release(0)
    run.settle()
    assert sorted(rewards.waiting) == [1, 2], "rows 0 and 2 lost two engines together: one after the other"
    run.close()


def test_a_prompt_whose_engines_die_again_and_again_is_quarantined_and_its_place_given_away():
    run, _, rewards = driven(windowed=True, staleness=1)
    pool = run.pipeline.dispatcher.pool
    pool.on_loss = lambda member, how: pool.put(Member(member.place, FakeEngine(name=member.name), MemberState.SERVING))
    run.admit(0)
    for _ in range(4):
        group = next(g for g in run.groups.all() if g.ref.row == 1)
        kill(run, rewards, group.sent.member, 1)
    assert run.groups.quarantined == {("d:1", 0): "4 engines or reward actors died of it, the last: The actor died."}
    assert [g.ref.row for g in run.groups.all()] == [0, 2, 3, 4, 5, 6], "row 6 has its place"
    reason = "4 engines or reward actors died of it, the last: The actor died."
    assert run.groups.state()["quarantined"] == [["d:1", 0, reason]]
    run.close()


def test_who_was_only_beside_what_kills_is_not_taken_for_it():
    """Rows 0 and 1 lose two engines together; row 1 kills each that it gets."""
    run, _, rewards = driven(windowed=True, staleness=1)
    pool = run.pipeline.dispatcher.pool
    pool.on_loss = lambda member, how: pool.put(Member(member.place, FakeEngine(name=member.name), MemberState.SERVING))
    run.admit(0)

    def group(row: int) -> Group:
        return next(g for g in run.groups.all() if g.ref.row == row)

    for _ in range(2):
        for row in (0, 1):
            kill(run, rewards, group(row).sent.member, row)
    assert (group(0).deaths, group(1).deaths) == (2, 2)
    assert sorted(rewards.waiting) == [0, 2], "one of the two waits until the other has ended"
    rewards.release(0)
    run.settle()
    for _ in range(2):
        kill(run, rewards, group(1).sent.member, 1)
    assert list(run.groups.quarantined) == [("d:1", 0)] and group(0).state == "scored"
    run.close()


def test_what_was_sampled_is_scored_by_another_reward_actor():
    run, _, rewards = driven()
    other = FakeRewards(name="reward-1")
    run.pipeline.dispatcher.rewards = pool = Pool([rewards, other])
    pool.on_loss = lambda member, how: None
    run.admit(0)
    rewards.kill()
    for row in (0, 2):
        rewards.waiting.pop(row)[0].set_exception(ActorLost(rewards.id))
    assert [s.ref.row for s in run.batch(0).summaries] == [0, 1, 2]
    engines = run.pipeline.dispatcher.pool.actors
    assert [len(engine.asked) for engine in engines] == [2, 1], "nothing is sampled again"
    run.close()


def test_a_group_that_kills_its_reward_actors_is_quarantined_too():
    run, _, rewards = driven(windowed=True, staleness=1)
    current = [rewards]

    def another(member: Member, how: str) -> None:
        current.append(FakeRewards(held=[0, 1, 2], name=member.name))
        run.pipeline.dispatcher.rewards.put(Member(0, current[-1], MemberState.SERVING))

    run.pipeline.dispatcher.rewards.on_loss = another
    run.admit(0)
    for row in (0, 2):
        rewards.release(row)
    for _ in range(4):
        current[-1].kill()
        current[-1].waiting.pop(1)[0].set_exception(ActorLost(current[-1].id))
        run.settle()
    reason = "4 engines or reward actors died of it, the last: The actor died."
    assert run.groups.quarantined == {("d:1", 0): reason} and len(current) == 5
    engines = run.pipeline.dispatcher.pool.actors
    assert sum(len(engine.seeds(1)) for engine in engines) == 1, "it was sampled once"
    run.close()


def test_the_data_actor_is_replaced_behind_the_last_prompt_that_arrived():
    pipeline = make_pipeline(staleness=1)
    data = pipeline.prompts.data
    kept = Kept(data, make=lambda name: FakeData())
    run = Driven(pipeline)
    run.admit(0)
    first = run.batch(0)

    async def story() -> None:
        async with kept.keeper(join=pipeline.prompts.renew).running():
            data.actors[0].kill()
            pipeline.admit(1)
            await turns()

    run.run(story())
    assert [s.ref.row for s in first.summaries] == [0, 1, 2] and len(kept.made) == 1
    assert [s.ref.row for s in run.batch(1).summaries] == [3, 4, 5]
    assert [g.ref.row for g in run.groups.unsealed()] == [6, 7, 8], "no prompt is left out or taken twice"
    run.close()
