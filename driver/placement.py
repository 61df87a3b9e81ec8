"""Where everything runs: one placement group per rollout actor, one for the learner, one for the rewards.

Rollout, learner and reward resources come from the configuration independently of each other. A placement that cannot
be met within `cluster.placement_timeout` fails, saying what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from driver.config import RunConfig
from rewards.registry import load_reward
from rewards.reward_model import RewardModelReward

Device = Literal["cuda", "cpu"]


class PlacementError(RuntimeError):
    """The cluster cannot place an actor; says which, what it asks for, and what there is."""


@dataclass(frozen=True)
class Demand:
    """What one kind of actor asks for: `count` bundles of `resources`."""

    role: str
    resources: Mapping[str, float]
    count: int
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK"]


@dataclass
class Placement:
    """Placement groups that are met. `options(role, i)` are Ray options of the role's i-th actor."""

    device: Device
    _slots: dict[str, list[tuple[PlacementGroup, int, Mapping[str, float]]]] = field(default_factory=dict)

    def options(self, role: str, index: int) -> dict[str, Any]:
        group, bundle, resources = self._slots[role][index]
        custom = {k: v for k, v in resources.items() if k not in ("CPU", "GPU")}
        return {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "resources": custom,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        }

    def release(self) -> None:
        for group in {id(g): g for slots in self._slots.values() for g, _, _ in slots}.values():
            remove_placement_group(group)
        self._slots.clear()


def choose_device(config: RunConfig) -> Device:
    """`cluster.device`, with auto resolved by whether the cluster has GPUs."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def demands(config: RunConfig, device: Device, *, training: bool = True) -> list[Demand]:
    """Everything that must be placed, without the learner if nothing is trained.

    On GPUs an engine takes `tensor_parallel_size` of them in one node, a learner rank takes one."""
    gpus = device == "cuda"
    tp = config.rollout.tensor_parallel_size
    asked = config.cluster.resources
    rollout = {**({"GPU": float(tp)} if gpus else {}), **asked["rollout"]}
    learner = {**({"GPU": 1.0} if gpus else {}), **asked["learner"]}
    reward = asked["reward"]
    engines = [Demand(f"rollout-{i}", rollout, 1, "STRICT_PACK") for i in range(config.rollout.engines)]
    rewards = Demand("reward", reward, config.reward.actors, "SPREAD")
    learners = [Demand("learner", learner, config.learner.ranks, "PACK")] if training else []
    return [*engines, *learners, rewards, *reward_models(config)]


def reward_models(config: RunConfig) -> list[Demand]:
    """The actors of reward models, which take a GPU (a share, with `gpus`) where they compute on one."""
    found = []
    for i, spec in enumerate(config.reward.functions):
        if spec.name == "reward_model":
            reward = load_reward(spec.name, spec.options)
            assert isinstance(reward, RewardModelReward)
            options = reward.model_options
            gpus = options.gpus if options.device.startswith("cuda") else 0.0
            found.append(Demand(f"reward_model-{i}", {"GPU": gpus} if gpus else {}, 1, "STRICT_PACK"))
    return found


def local_resources(config: RunConfig) -> dict[str, float]:
    """What a local Ray must offer for the whole configuration, but for GPUs, which it finds itself: logical CPUs,
    and the custom resources of cluster.resources, which name groups of nodes where there is more than one."""
    wanted: dict[str, float] = {"CPU": 0.0}
    for demand in demands(config, "cpu"):
        for name, amount in demand.resources.items():
            if name != "GPU":
                wanted[name] = wanted.get(name, 0.0) + amount * demand.count
    return {**wanted, "CPU": int(wanted["CPU"]) + 1}


def place(config: RunConfig, *, training: bool = True) -> Placement:
    """Create all placement groups and wait until they are met. Raises PlacementError."""
    device = choose_device(config)
    placement = Placement(device)
    wanted = demands(config, device, training=training)
    # A bundle of nothing cannot be placed; an actor that asks for nothing still needs one.
    bundles = {d.role: {k: v for k, v in d.resources.items() if v > 0} or {"CPU": 0.001} for d in wanted}
    groups = {d.role: placement_group([bundles[d.role]] * d.count, strategy=d.strategy) for d in wanted}
    for demand in wanted:
        role = demand.role.split("-")[0]
        slots = placement._slots.setdefault(role, [])
        slots += [(groups[demand.role], i, bundles[demand.role]) for i in range(demand.count)]
    deadline = time.monotonic() + config.cluster.placement_timeout
    unmet = [d for d in wanted if not groups[d.role].wait(max(0.0, deadline - time.monotonic()))]
    if unmet:
        placement.release()
        raise PlacementError(_explain(unmet, wanted, config.cluster.placement_timeout, device))
    return placement


def _explain(unmet: list[Demand], wanted: list[Demand], timeout: float, device: Device) -> str:
    """Which demand was not met, and how it compares with what the cluster has in all and free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    needed: dict[str, float] = {}
    for demand in wanted:
        for name, amount in demand.resources.items():
            needed[name] = needed.get(name, 0.0) + amount * demand.count
    lines = [f"the cluster could not place everything within {timeout:g} s (cluster.placement_timeout):"]
    for demand in unmet:
        asks = ", ".join(f"{v:g} {k}" for k, v in demand.resources.items())
        lines.append(f"  - {demand.role}: {demand.count} x ({asks}) not placed")
    for name, amount in needed.items():
        has, left = total.get(name, 0.0), free.get(name, 0.0)
        short = f"; {amount - has:g} missing" if amount > has else ""
        lines.append(f"  {name}: the run needs {amount:g}, the cluster has {has:g} ({left:g} free){short}")
    if device == "cuda":
        lines.append("  set rollout.engines, rollout.tensor_parallel_size and learner.ranks to what the cluster has,")
        lines.append("  or add nodes; an engine's GPUs must be in one node")
    else:
        lines.append("  lower the CPUs in cluster.resources, or add nodes")
    return "\n".join(lines)
