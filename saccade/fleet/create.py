"""Factory: makes the actors of a run in their places. Nothing is started here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import ray

from learner.group import LearnerGroup
from learner.plan.predict import predict
from learner.types import LearnerOptions
from rewards.actor import RewardActor
from rollout.actor import RolloutActor
from rollout.data.actor import DataActor
from rollout.handle import RayEngineHandle
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
from saccade.fleet.handles import HEALTH, RayData, RayRewards
from saccade.fleet.placement import Placement
from saccade.fleet.reward_services import EngineJudge, Services, create_services
from vlm.adapter import MultimodalAdapter
from vlm.media.types import MediaKind

CONCURRENT_GROUPS = 10_000
"""Calls one rollout actor may hold at once; the engine's scheduler decides how many of them run."""


@dataclass
class Factory:
    config: RunConfig
    placement: Placement
    adapter: MultimodalAdapter
    media_kinds: Sequence[MediaKind]
    """The kinds of media that prompts may hold."""
    training: bool = True
    services: Services = field(default_factory=Services)

    @property
    def load(self) -> partial[MultimodalAdapter]:
        """Processors are loaded where they are used, and do not travel."""
        return partial(config_adapter, self.config)

    def data(self) -> RayData:
        config = self.config
        held_out = data_options(config, config.data.eval, train=False) if config.data.eval else None
        actor = ray.remote(num_cpus=0, concurrency_groups={HEALTH: 1})(DataActor)
        return RayData("data", actor.remote(self.load, data_options(config, config.data.train), held_out))

    def engine(self, place: int) -> RayEngineHandle:
        config = self.config
        options = engine_options(config, self.placement.device, self.media_kinds, weights_change=self.training)
        threads = {"env_vars": {"OMP_NUM_THREADS": str(options.threads)}}
        actor = ray.remote(RolloutActor).options(
            max_concurrency=CONCURRENT_GROUPS, runtime_env=threads, **self.placement.options("rollout", place)
        )
        name = f"rollout-{place}"
        made = actor.remote(name, options, self.load, group_timeout=config.cluster.group_timeout)
        return RayEngineHandle(name, made, config.rollout.tensor_parallel_size)

    def create_services(self, engines: Sequence[RayEngineHandle]) -> None:
        """Make what rewards call upon; the reward actors that are made afterwards know it."""
        self.services = create_services(self.config, self.placement, engines, self.load)

    def judge(self, engines: Sequence[RayEngineHandle]) -> EngineJudge | None:
        """The service of a judge over these engines, from now on; None where no reward calls upon one."""
        if "generate" not in self.services.by_name:
            return None
        self.services.by_name["generate"] = judge = EngineJudge(engines, self.load)
        return judge

    def reward(self, place: int) -> RayRewards:
        config, name = self.config, f"reward-{place}"
        actor = ray.remote(concurrency_groups={HEALTH: 1}, **self.placement.options("reward", place))(RewardActor)
        made = actor.remote(
            config.reward.functions,
            timeout=config.reward.timeout,
            start_timeout=config.cluster.start_timeout,
            services=self.services.by_name,
            trace=trace_shown(config),
            name=name,
        )
        return RayRewards(name, made)

    def learner(self) -> LearnerGroup:
        config, device = self.config, self.placement.device
        environment = {"env_vars": learner_environment(config, device)}
        places = [
            {**self.placement.options("learner", rank), "runtime_env": environment}
            for rank in range(config.learner.ranks)
        ]
        return LearnerGroup(self._learner_options(), places, weight_transfer_options(config, device))

    def _learner_options(self) -> LearnerOptions:
        """The learner's options. Micro-batches limited in bytes need to know what tokens and patches take."""
        options = learner_options(self.config, self.placement.device, self.media_kinds)
        if options.learner.micro_batch_bytes is None:
            return options
        try:
            return predict(options, self.adapter).options
        except ValueError as error:
            raise RunError(f"learner.micro_batch: {error}") from error
