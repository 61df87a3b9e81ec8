"""Handles: actors as other processes see them. They travel by value, and every call returns at once."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray

from rollout.engines.protocol import SamplingParams
from rollout.types import Together
from weight_sync.verify import WeightReport


@dataclass(frozen=True)
class RayHandle:
    """An actor as other processes see it; it travels by value."""

    name: str
    actor: Any
    """Ray's handle."""

    @property
    def id(self) -> str:
        return str(self.actor._actor_id.hex())

    def start(self) -> Future[None]:
        return self.actor.start.remote().future()

    def node(self) -> Future[str]:
        return self.actor.__ray_call__.remote(_node).future()

    def check_health(self) -> Future[None]:
        return self.actor.check_health.remote().future()

    def kill(self) -> None:
        ray.kill(self.actor)


def _node(actor: object) -> str:
    return ray.get_runtime_context().get_node_id()


@dataclass(frozen=True)
class RayEngineHandle(RayHandle):
    """A RolloutActor: what samples groups, and `weight_sync.protocols.EngineHandle`."""

    workers: int = 1

    def sample(
        self,
        prompt: Any,
        sampling: SamplingParams,
        seed: int | None = None,
        attempt: int | None = None,
        together: Together | None = None,
    ) -> ray.ObjectRef:
        """`RolloutActor.sample`, for a Prompt or a reference of one."""
        return self.actor.sample.remote(prompt, sampling, seed, attempt, together)

    def has_answered(self, group: ray.ObjectRef) -> bool:
        """Whether what `sample` returned is there."""
        return bool(ray.wait([group], timeout=0, fetch_local=False)[0])

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> Future[None]:
        return self.actor.init_weight_transfer.remote(init_info).future()

    def pause(self) -> Future[None]:
        return self.actor.pause.remote().future()

    def receive_weights(self, update_info: Mapping[str, Any]) -> Future[WeightReport]:
        return self.actor.receive_weights.remote(update_info).future()

    def commit(self, version: int) -> Future[None]:
        return self.actor.commit.remote(version).future()

    def resume(self) -> Future[None]:
        return self.actor.resume.remote().future()
