"""All actors of a run: created in their places, started side by side, ended together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from learner.deaths import how_it_died
from learner.group import LearnerGroup
from learner.plan.predict import predict
from learner.types import LearnerOptions
from rewards.actor import RewardActor
from rollout.actor import RayEngineHandle, RolloutActor
from rollout.data.actor import DataActor, DataActorReport
from rollout.types import StoredPrompt
from saccade.config.options import (
    config_adapter,
    data_options,
    engine_options,
    learner_environment,
    learner_options,
    trace_shown,
    weight_transfer_options,
)
from saccade.config.run_config import RunConfig
from saccade.errors import RunError
from saccade.fleet.handles import RayData, RayRewards
from saccade.fleet.placement import Placement
from saccade.fleet.pool import EnginePool
from saccade.fleet.reward_services import create_services
from saccade.fleet.waiting import CALL_TIMEOUT, wait_for
from vlm.adapter import MultimodalAdapter
from vlm.media.types import MediaKind

CONCURRENT_GROUPS = 10_000
"""Calls one rollout actor may hold at once; the engine's scheduler decides how many of them run."""


@dataclass
class Actors:
    """The only owner of the handles of everything that runs."""

    pool: EnginePool[RayEngineHandle] = field(default_factory=EnginePool)
    rewards: list[RayRewards] = field(default_factory=list)
    models: list[Any] = field(default_factory=list)
    """Actors of reward models."""
    _data: RayData | None = None
    _learner: LearnerGroup | None = None
    """None where nothing is trained."""

    @property
    def data(self) -> RayData:
        assert self._data is not None, "the data actor was not created"
        return self._data

    @property
    def learner(self) -> LearnerGroup:
        assert self._learner is not None, "nothing is trained"
        return self._learner

    def held_out(self, limit: int | None, group_by: str | None, timeout: float) -> list[tuple[StoredPrompt, str]]:
        """The held-out prompts, each with the name of its group."""
        return wait_for(self.data.held_out(limit, group_by), timeout, "the held-out prompts (cluster.timeout)")

    def data_report(self) -> DataActorReport:
        return wait_for(self.data.report(), CALL_TIMEOUT, "the report on the data")

    def questions(self) -> dict[str, Callable[[], ray.ObjectRef]]:
        """Every process of the run by its name for the user, and a call that it answers while it lives. For engines
        that were started: the whole engine answers. The others run a built-in function: one of ours they would have to
        import, for seconds in which they neither answer nor end."""
        named = {f"learner rank {i}": rank for i, rank in enumerate(self._learner.ranks if self._learner else ())}
        named |= {f"reward actor {i}": rewards.actor for i, rewards in enumerate(self.rewards)}
        named |= {f"reward model {i}": actor for i, actor in enumerate(self.models)}
        named |= {"the data actor": self.data.actor}
        engines = {f"engine {engine.name}": engine.actor.check_health.remote for engine in self.pool.members}
        return engines | {name: partial(actor.__ray_call__.remote, callable) for name, actor in named.items()}

    def shutdown(self) -> None:
        """End every process; engines and rewards are asked first, since they have children of their own."""
        parents = [engine.actor for engine in self.pool.members] + [rewards.actor for rewards in self.rewards]
        polite = [actor.shutdown.remote() for actor in parents]
        ray.wait(polite, num_returns=len(polite), timeout=20.0) if polite else None
        if self._learner is not None:
            self._learner.shutdown()
        for actor in [*parents, *self.models, *([self._data.actor] if self._data is not None else [])]:
            ray.kill(actor)


def start_actors(
    config: RunConfig,
    placement: Placement,
    adapter: MultimodalAdapter,
    media_kinds: Sequence[MediaKind],
    check_stop: Callable[[], None],
    *,
    training: bool = True,
) -> Actors:
    """Create all actors and wait until each is ready. `media_kinds`: what prompts may hold.

    Raises RunError naming the first that is not ready."""
    actors = Actors()
    try:
        _create(actors, config, placement, adapter, media_kinds, training)
        starting = {actors.data.actor.start.remote(): "the data actor"}
        starting |= {engine.actor.start.remote(): f"engine {engine.name}" for engine in actors.pool.members}
        starting |= {r.actor.start.remote(): f"reward actor {i}" for i, r in enumerate(actors.rewards)}
        starting |= {m.start.remote(): "the reward model" for m in actors.models}
        with ThreadPoolExecutor(1) as pool:
            learner = actors.learner if training else None
            learning = pool.submit(learner.start, config.cluster.start_timeout) if learner is not None else None

            def check() -> None:
                check_stop()
                if learning is not None and learning.done():
                    learning.result()  # a learner that failed ends the wait for the others

            try:
                _await_start(starting, config.cluster.start_timeout, check)
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


def _create(
    actors: Actors,
    config: RunConfig,
    placement: Placement,
    adapter: MultimodalAdapter,
    media_kinds: Sequence[MediaKind],
    training: bool,
) -> None:
    load = partial(config_adapter, config)  # processors are loaded where they are used, and do not travel
    held_out = data_options(config, config.data.eval, train=False) if config.data.eval else None
    actors._data = RayData(
        ray.remote(DataActor).options(num_cpus=0).remote(load, data_options(config, config.data.train), held_out)
    )
    options = engine_options(config, placement.device, media_kinds, weights_change=training)
    threads = {"env_vars": {"OMP_NUM_THREADS": str(options.threads)}}
    for i in range(config.rollout.engines):
        engine = ray.remote(RolloutActor).options(
            max_concurrency=CONCURRENT_GROUPS, runtime_env=threads, **placement.options("rollout", i)
        )
        name = f"rollout-{i}"
        actor = engine.remote(name, options, load, group_timeout=config.cluster.group_timeout)
        actors.pool.add(RayEngineHandle(name, actor, config.rollout.tensor_parallel_size))
    services = create_services(config, placement, actors.pool.members, load)
    actors.models = services.models
    for i in range(config.reward.actors):
        reward = ray.remote(RewardActor).options(**placement.options("reward", i))
        actor = reward.remote(
            config.reward.functions,
            timeout=config.reward.timeout,
            start_timeout=config.cluster.start_timeout,
            services=services.by_name,
            trace=trace_shown(config),
            name=f"reward-{i}",
        )
        actors.rewards.append(RayRewards(actor))
    if training:
        learner = config.learner
        environment = {"env_vars": learner_environment(config, placement.device)}
        places = [{**placement.options("learner", r), "runtime_env": environment} for r in range(learner.ranks)]
        options_ = _learner_options(config, placement, adapter, media_kinds)
        actors._learner = LearnerGroup(options_, places, weight_transfer_options(config, placement.device))


def _learner_options(
    config: RunConfig, placement: Placement, adapter: MultimodalAdapter, media_kinds: Sequence[MediaKind]
) -> LearnerOptions:
    """The learner's options. Micro-batches that are limited in bytes need to know what tokens and patches take."""
    options = learner_options(config, placement.device, media_kinds)
    if options.learner.micro_batch_bytes is None:
        return options
    try:
        return predict(options, adapter).options
    except ValueError as error:
        raise RunError(f"learner.micro_batch: {error}") from error


def _await_start(starting: dict[ray.ObjectRef, str], timeout: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + timeout
    while starting:
        check()
        ready, _ = ray.wait(list(starting), timeout=1.0)
        for reference in ready:
            what = starting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise RunError(f"{what} did not start: {error.cause}") from error
            except ray.exceptions.RayError as error:
                raise RunError(f"{what} did not start: it died{how_it_died(str(error))}") from error
        if starting and time.monotonic() > deadline:
            names = ", ".join(starting.values())
            raise RunError(f"waited {timeout:g} s (a third of cluster.timeout) for {names} to start")
