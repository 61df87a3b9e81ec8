"""The sections of a run that no other room reads: evaluation, checkpoints, the cluster."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from vlm.section import After, Parsed, section

ActorRole = Literal["rollout", "learner", "reward"]
Resources = dict[ActorRole, dict[str, Annotated[float, Ge(0)]]]
DEFAULT_CPUS: dict[ActorRole, float] = {"rollout": 1.0, "learner": 1.0, "reward": 0.5}


def _with_cpus(given: Resources) -> Resources:
    return {role: {"CPU": cpus, **given.get(role, {})} for role, cpus in DEFAULT_CPUS.items()}


@section
class EvalConfig:
    every: Annotated[int, Ge(0)] = 0
    """Steps between evaluations on data.eval; 0: at the start and the end only."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature of evaluation; 0 is greedy."""
    max_prompts: Annotated[int, Ge(1)] | None = None
    """Held-out prompts used, drawn from all files with the run's seed; default all."""


def _interval(value: Any) -> int | str:
    """Steps as a number; time as `<number> s`, `min` or `h`."""
    text = str(value)
    time = re.fullmatch(r"\s*([0-9.]+)\s*(s|min|h)\s*", text)
    try:
        size = float(time[1]) if time else float(int(text))
    except ValueError:
        size = -1.0
    if isinstance(value, bool) or size < 0 or (time and not size):
        raise ValueError("should be a number of steps, such as 50, or a time, such as 15 min (s, min, h)")
    return f"{size:.12g} {time[2]}" if time else int(text)


@section
class CheckpointConfig:
    every: Annotated[int | str, Parsed(_interval)] = "15 min"
    """Distance between checkpoints, lost at most in a crash: steps (50), or time (15 min), after which one is written
    with the step that ends next; 0: only at the end and on interruption."""
    keep: Annotated[int, Ge(1)] = 2
    """Checkpoints kept."""

    def due(self, version: int, seconds: float) -> bool:
        """Return whether one is due after `version` updates, `seconds` after the one before."""
        if isinstance(self.every, int):
            return self.every > 0 and version % self.every == 0
        size, unit = self.every.split()
        return seconds >= float(size) * {"s": 1, "min": 60, "h": 3600}[unit]


@section
class ClusterConfig:
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where engines and learners run. auto: cuda if the cluster has GPUs."""
    resources: Annotated[Resources, After(_with_cpus)] = field(default_factory=lambda: _with_cpus({}))
    """Ray resources of one engine (`rollout`), one learner rank (`learner`) and one reward actor (`reward`): CPU,
    which is the number of its compute threads too, and custom ones that pin them to labelled nodes. GPUs follow from
    the device."""
    timeout: Annotated[float, Gt(0)] = 1800.0
    """Seconds in which a call on the learner must end. A third of it is the limit for everything to be placed, for
    actors to start, and for one group to be generated; a sixth for each call of a weight sync."""
    metrics_port: Annotated[int, Ge(0), Le(65535)] = 0
    """Port of the driver's own Prometheus endpoint; 0: none (Ray's node endpoints always have the metrics)."""

    @property
    def gpu_shares(self) -> dict[ActorRole, float]:
        """The roles whose actors are given a part of a GPU, which another actor may share."""
        return {role: asked["GPU"] for role, asked in self.resources.items() if 0 < asked.get("GPU", 1) < 1}

    @property
    def start_timeout(self) -> float:
        """Seconds in which everything must be placed, and then started."""
        return self.timeout / 3

    @property
    def group_timeout(self) -> float:
        """Seconds in which the completions of one group must be generated."""
        return self.timeout / 3

    @property
    def sync_timeout(self) -> float:
        """Seconds in which each call of a weight sync must end."""
        return self.timeout / 6
