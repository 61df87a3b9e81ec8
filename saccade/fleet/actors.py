"""All actors of a run: started side by side, replaced one by one, ended together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from learner.deaths import how_it_died
from learner.group import LearnerGroup
from rollout.data.actor import DataActorReport
from rollout.handle import RayEngineHandle
from rollout.types import StoredPrompt
from saccade.errors import RunError
from saccade.fleet.create import Factory
from saccade.fleet.engine_fleet import HOLDS_WEIGHTS, EngineFleet
from saccade.fleet.handles import RayData, RayRewards
from saccade.fleet.keeper import QUESTIONS, Keeper, overslept
from saccade.fleet.pool import EnginePool, Member, MemberState, Pool
from saccade.fleet.tasks import Tasks
from saccade.fleet.waiting import CALL_TIMEOUT, in_thread, wait_for

Rejoin = Callable[[Member[Any]], Awaitable[None]]


@dataclass
class Actors:
    """The only owner of the handles of everything that runs."""

    engines: EnginePool[RayEngineHandle] = field(default_factory=EnginePool)
    rewards: Pool[RayRewards] = field(default_factory=Pool)
    data: Pool[RayData] = field(default_factory=Pool)
    """One data actor."""
    models: list[Any] = field(default_factory=list)
    """Actors of reward models."""
    _learner: LearnerGroup | None = None
    """None where nothing is trained."""
    _factory: Factory | None = None
    _engine_keeper: Keeper[RayEngineHandle] | None = None
    _keepers: list[Keeper[Any]] = field(default_factory=list)

    @property
    def learner(self) -> LearnerGroup:
        assert self._learner is not None, "nothing is trained"
        return self._learner

    def held_out(self, limit: int | None, group_by: str | None, timeout: float) -> list[tuple[StoredPrompt, str]]:
        """The held-out prompts, each with the name of its group."""
        call = self.data.actors[0].held_out(limit, group_by)
        return wait_for(call, timeout, "the held-out prompts (cluster.timeout)")

    def data_report(self) -> DataActorReport:
        """The report of the data actor. Raises RunError where it is lost just now."""
        if not (serving := self.data.serving):
            raise RunError("no data actor serves")
        return wait_for(serving[0].actor.report(), CALL_TIMEOUT, "the report on the data")

    def questions(self) -> dict[str, Callable[[], ray.ObjectRef]]:
        """Every process of the run by its name for the user, and a call that it answers while it lives. For engines
        that were started: the whole engine answers. The others run a built-in function: one of ours they would have to
        import, for seconds in which they neither answer nor end."""
        named = {f"learner rank {i}": rank for i, rank in enumerate(self._learner.ranks if self._learner else ())}
        named |= {f"reward actor {m.place}": m.actor.actor for m in self.rewards.members}
        named |= {f"reward model {i}": actor for i, actor in enumerate(self.models)}
        named |= dict.fromkeys(["the data actor"], self.data.members[0].actor.actor)
        started = [m.actor for m in self.engines.members if m.state in HOLDS_WEIGHTS]
        engines = {f"engine {engine.name}": engine.actor.check_health.remote for engine in started}
        return engines | {name: partial(actor.__ray_call__.remote, callable) for name, actor in named.items()}

    # ------------------------------------------------------------------ while the run goes on

    def keep(self, fleet: EngineFleet, say: Callable[[str], None], rejoin_data: Rejoin | None = None) -> None:
        """Replace from now on who dies or hangs, as long as the body of `kept` runs."""
        factory = self._factory
        assert factory is not None
        cluster = factory.config.cluster
        limits: dict[str, Any] = {"start_timeout": cluster.start_timeout, "silence": cluster.sync_timeout, "say": say}

        async def engine(place: int, avoid: Collection[str]) -> RayEngineHandle:
            await factory.placement.placed("rollout", place, say, avoid)
            return factory.engine(place)

        async def join(member: Member[Any]) -> None:
            await fleet.join(member)
            tell_judge()

        def tell_judge() -> None:
            serving = [member.actor for member in self.engines.serving]
            if serving and (judge := factory.judge(serving)):
                for rewards in self.rewards.actors:
                    rewards.set_service("generate", judge)

        async def reward(place: int, avoid: Collection[str]) -> RayRewards:
            await factory.placement.placed("reward", place, say, avoid)
            return factory.reward(place)

        async def data(place: int, avoid: Collection[str]) -> RayData:
            return factory.data()

        def leave(place: int) -> None:
            factory.placement.give_up("rollout", place)
            tell_judge()

        self._engine_keeper = Keeper(self.engines, engine, join=join, leave=leave, excused=fleet.excused, **limits)
        self._keepers = [
            self._engine_keeper,
            Keeper(self.rewards, reward, **limits),
            Keeper(self.data, data, join=rejoin_data, **limits),
        ]

    def health(self) -> dict[str, Future[None]]:
        """Ask everybody whether he lives: an answer by name."""
        members: list[Member[Any]] = [*self.engines.members, *self.rewards.members, *self.data.members]
        asked = {m.name: m.actor.check_health() for m in members if m.state is not MemberState.DEAD}
        return asked | (self._learner.health() if self._learner is not None else {})

    async def _watch_learner(self, silence: float) -> None:
        """Kill a rank that hangs: the call on the learner that waits for it, now or next, then says so."""
        while self._learner is not None:
            await asyncio.sleep(silence / QUESTIONS)
            since = time.monotonic()
            learner, asked = self._learner, self._learner.health()
            answers = [asyncio.wrap_future(answer) for answer in asked.values()]
            answered, _ = await asyncio.wait(answers, timeout=silence) if answers else ((), ())
            for each in answered:
                each.exception()  # of a dead one: whoever waits for it learns of that
            for name, answer in asked.items():
                if not answer.done() and learner is self._learner and not overslept(since, silence):
                    learner.kill(name)

    def scale(self, engines: int) -> None:
        """Let there be so many engines from now on."""
        assert self._engine_keeper is not None
        self._engine_keeper.scale(engines)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Watch over all pools beside the body."""
        async with AsyncExitStack() as stack:
            for keeper in self._keepers:
                await stack.enter_async_context(keeper.running())
            tasks = Tasks()
            stack.push_async_callback(tasks.cancel)
            if self._factory is not None:
                tasks.spawn(self._watch_learner(self._factory.config.cluster.sync_timeout))
            yield

    def check(self) -> None:
        """Raises RunError where nobody of a kind is left and nobody will come."""
        for keeper in self._keepers:
            keeper.check()

    async def renew_learner(self, say: Callable[[str], None]) -> None:
        """Start another learner in the place of one that failed. Raises LearnerError, or RunError where the
        cluster has no place for it."""
        assert self._factory is not None
        cluster, placement = self._factory.config.cluster, self._factory.placement
        self.learner.shutdown()
        try:
            async with asyncio.timeout(cluster.timeout):
                for rank in range(self._factory.config.learner.ranks):
                    await placement.placed("learner", rank, say)
        except TimeoutError as error:
            raise RunError(f"waited {cluster.timeout:g} s (cluster.timeout) for a place for the learner") from error
        self._learner = learner = self._factory.learner()
        await in_thread(lambda: learner.start(cluster.start_timeout))

    def shutdown(self) -> None:
        """End every process; engines and rewards are asked first, since they have children of their own."""
        parents = [engine.actor for engine in self.engines.actors] + [rewards.actor for rewards in self.rewards.actors]
        polite = [actor.shutdown.remote() for actor in parents]
        ray.wait(polite, num_returns=len(polite), timeout=20.0) if polite else None
        if self._learner is not None:
            self._learner.shutdown()
        for actor in [*parents, *self.models, *(data.actor for data in self.data.actors)]:
            ray.kill(actor)


def start_actors(factory: Factory, check_stop: Callable[[], None]) -> Actors:
    """Create all actors and wait until each is ready. Raises RunError naming the first that is not ready."""
    actors = Actors(_factory=factory)
    timeout = factory.config.cluster.start_timeout
    try:
        _create(actors, factory)
        starting = {actors.data.actors[0].start(): "the data actor"}
        starting |= {engine.start(): f"engine {engine.name}" for engine in actors.engines.actors}
        starting |= {r.start(): f"reward actor {i}" for i, r in enumerate(actors.rewards.actors)}
        starting |= {m.start.remote().future(): "the reward model" for m in actors.models}
        with ThreadPoolExecutor(1) as pool:
            learner = actors._learner
            learning = pool.submit(learner.start, timeout) if learner is not None else None

            def check() -> None:
                check_stop()
                if learning is not None and learning.done():
                    learning.result()  # a learner that failed ends the wait for the others

            try:
                _await_start(starting, timeout, check)
            except BaseException:
                if learner is not None:
                    learner.shutdown()  # ends the wait of the other thread
                raise
            if learning is not None:
                learning.result()
    except BaseException:
        actors.shutdown()
        raise
    return actors


def _create(actors: Actors, factory: Factory) -> None:
    config = factory.config
    actors.data = Pool([factory.data()])
    engines = [factory.engine(i) for i in range(config.rollout.engines)]
    actors.engines = EnginePool(engines, by_load=config.rollout.windowed)
    factory.create_services(engines)
    actors.models = factory.services.models
    actors.rewards = Pool(factory.reward(i) for i in range(config.reward.actors))
    if factory.training:
        actors._learner = factory.learner()


def _await_start(starting: dict[Future[None], str], timeout: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + timeout
    while starting:
        check()
        ready, _ = wait(starting, timeout=1.0, return_when="FIRST_COMPLETED")
        for call in ready:
            what = starting.pop(call)
            try:
                call.result()
            except ray.exceptions.RayTaskError as error:
                raise RunError(f"{what} did not start: {error.cause}") from error
            except ray.exceptions.RayError as error:
                raise RunError(f"{what} did not start: it died{how_it_died(str(error))}") from error
        if starting and time.monotonic() > deadline:
            names = ", ".join(starting.values())
            raise RunError(f"waited {timeout:g} s (a third of cluster.timeout) for {names} to start")
