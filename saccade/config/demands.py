"""Compute the resources that a run needs from the configuration alone. No cluster is asked, and Ray is not imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rewards.functions.reward_model import RewardModelReward
from rewards.registry import load_reward
from saccade.config.run_config import RunConfig

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Demand:
    """One kind of actor needs `count` bundles of `resources`."""

    role: str
    resources: Mapping[str, float]
    count: int
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK"]


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
    """Return what a local Ray must offer for the whole configuration: logical CPUs, and the custom resources of
    cluster.resources, which name groups of nodes in larger clusters. Ray finds GPUs itself."""
    wanted: dict[str, float] = {"CPU": 0.0}
    for demand in demands(config, "cpu"):
        for name, amount in demand.resources.items():
            if name != "GPU":
                wanted[name] = wanted.get(name, 0.0) + amount * demand.count
    return {**wanted, "CPU": int(wanted["CPU"]) + 1}


def totals(wanted: Iterable[Demand]) -> dict[str, float]:
    """Resource -> what all demands ask of it together."""
    needed: dict[str, float] = {}
    for demand in wanted:
        for name, amount in demand.resources.items():
            needed[name] = needed.get(name, 0.0) + amount * demand.count
    return needed


def asked_for(config: RunConfig) -> list[str]:
    """The sum of all that a training run asks for, and of what it is made up, a line for each device it may get."""
    device = config.cluster.device
    lines = []
    for each in (device,) if device != "auto" else ("cuda", "cpu"):
        wanted = demands(config, each)
        sums = [f"{amount:g} {name}" for name, amount in sorted(totals(wanted).items(), reverse=True)]
        kinds: dict[tuple[str, str], int] = {}
        for demand in wanted:
            what = " + ".join(f"{v:g} {k}" for k, v in sorted(demand.resources.items(), reverse=True)) or "nothing"
            kind = demand.role.split("-")[0], what
            kinds[kind] = kinds.get(kind, 0) + demand.count
        parts = ", ".join(f"{role} {count} x ({what})" for (role, what), count in kinds.items())
        where = f" with cluster.device={each}" if device == "auto" else ""
        lines.append(f"asks Ray{where} for {', '.join(sums)}: {parts}")
    return lines
