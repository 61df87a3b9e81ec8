"""Placement of all actors: one placement group per rollout actor, one for the learner, one for the rewards.

Rollout, learner and reward resources come from the configuration independently of each other. A placement that cannot
be met within a third of `cluster.timeout` fails, saying what is missing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from saccade.config.demands import Demand, Device, demands, totals
from saccade.config.run_config import RunConfig
from saccade.fleet.waiting import in_thread
from vlm.errors import UserError

SAY_SECONDS = 5.0
"""Seconds between two lines that say what the run waits for."""
ELSEWHERE_SECONDS = 60.0
"""Seconds for which another node is waited for than those on which actors die."""
NODE_LABEL = "ray.io/node-id"
"""Ray gives each node a label with its id."""
LOOK_SECONDS = 1.0
"""Longest wait for one demand before the others are looked at."""


class PlacementError(UserError, RuntimeError):
    """The cluster cannot place an actor; says which, what it asks for, and what there is."""


Slot = tuple[PlacementGroup, int, Mapping[str, float]]
"""A placement group, the index of a bundle in it, and the resources of that bundle."""


@dataclass
class Placement:
    """Placement groups that are met. `options(role, i)` are Ray options of the role's i-th actor."""

    device: Device
    _slots: dict[str, dict[int, Slot]] = field(default_factory=dict)

    def options(self, role: str, index: int) -> dict[str, Any]:
        group, bundle, resources = self._slots[role][index]
        custom = {k: v for k, v in resources.items() if k not in ("CPU", "GPU")}
        return {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "resources": custom,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        }

    async def placed(self, role: str, index: int, say: Callable[[str], None], avoid: Collection[str] = ()) -> None:
        """Wait until the role's i-th actor has a place, for as long as it takes: its node may be gone, and the run goes
        on without it. Nodes to `avoid` (by Ray's ids) are left out where others have room within ELSEWHERE_SECONDS."""
        slots, elsewhere = self._slots[role], False
        if index not in slots:
            slots[index] = _place_alone(next(iter(slots.values()))[2], ())
        elif elsewhere := bool(avoid) and self._node(role, index) in avoid:
            self._move(role, index, avoid)
        begin = time.monotonic()
        told = False
        while (await in_thread(lambda: self._table(role, index)))["state"] != "CREATED":
            if elsewhere and time.monotonic() - begin > ELSEWHERE_SECONDS:
                elsewhere = False
                self._move(role, index, ())
            if not told and time.monotonic() - begin > SAY_SECONDS:
                told = True
                asks = _asks_for(self._slots[role][index][2])
                say(f"{role}-{index} waits for a node with {asks} free")
            await asyncio.sleep(LOOK_SECONDS)

    def _move(self, role: str, index: int, avoid: Collection[str]) -> None:
        """Ask for another place in place of the one that the role's i-th actor has."""
        former = self._slots[role][index]
        self._slots[role][index] = _place_alone(former[2], avoid)
        self._remove(former)

    def give_up(self, role: str, index: int) -> None:
        """Release one place, if it was asked for."""
        if (slot := self._slots[role].pop(index, None)) is not None:
            self._remove(slot)

    def _remove(self, slot: Slot) -> None:
        """Release a place that nobody holds any more, unless others stand in its placement group."""
        if not any(other[0] == slot[0] for slots in self._slots.values() for other in slots.values()):
            remove_placement_group(slot[0])

    def _table(self, role: str, index: int) -> dict[str, Any]:
        table: dict[str, Any] = placement_group_table(self._slots[role][index][0])
        return table

    def _node(self, role: str, index: int) -> str:
        """Ray's id of the node where the place is; empty while there is none."""
        return str(self._table(role, index)["bundles_to_node_id"].get(self._slots[role][index][1], ""))

    def release(self) -> None:
        for group in {id(g): g for slots in self._slots.values() for g, _, _ in slots.values()}.values():
            remove_placement_group(group)
        self._slots.clear()


def _place_alone(resources: Mapping[str, float], avoid: Collection[str]) -> Slot:
    """A place of its own, on another node than those to `avoid` if the cluster has one."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    selector = [{NODE_LABEL: f"!in({','.join(sorted(avoid))})"}] if alive - set(avoid) and avoid else None
    return placement_group([dict(resources)], strategy="STRICT_PACK", bundle_label_selector=selector), 0, resources


def choose_device(config: RunConfig) -> Device:
    """`cluster.device`, with auto resolved by whether the cluster has GPUs."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def place(
    config: RunConfig,
    *,
    training: bool = True,
    grows: bool = True,
    say: Callable[[str], None] = lambda text: None,
    check_stop: Callable[[], None] = lambda: None,
) -> Placement:
    """Create all placement groups and wait until they are met; `say` is told every few seconds what is awaited, and
    `check_stop` raises what ends the wait. Raises PlacementError, at once where a Ray that does not grow lacks
    something."""
    device = choose_device(config)
    placement = Placement(device)
    wanted = demands(config, device, training=training)
    total, _ = _resources()
    if not grows and any(amount > total.get(name, 0.0) for name, amount in totals(wanted).items()):
        raise PlacementError(_explain(wanted, wanted, None, device))
    # A bundle of nothing cannot be placed; an actor that asks for nothing still needs one.
    bundles = {d.role: {k: v for k, v in d.resources.items() if v > 0} or {"CPU": 0.001} for d in wanted}
    groups = {d.role: placement_group([bundles[d.role]] * d.count, strategy=d.strategy) for d in wanted}
    for demand in wanted:
        role = demand.role.split("-")[0]
        slots = placement._slots.setdefault(role, {})
        for i in range(demand.count):
            slots[len(slots)] = groups[demand.role], i, bundles[demand.role]
    timeout = config.cluster.start_timeout
    begin = spoke = time.monotonic()
    unmet = wanted
    try:
        while unmet:
            check_stop()
            left = begin + timeout - time.monotonic()
            unmet = [d for d in unmet if not groups[d.role].wait(max(0.0, min(LOOK_SECONDS, left)))]
            if unmet and left <= 0:
                raise PlacementError(_explain(unmet, wanted, timeout, device))
            if unmet and time.monotonic() - spoke >= SAY_SECONDS:
                spoke = time.monotonic()
                lines = shortages(wanted, unmet, *_resources())
                say(f"waiting for the cluster ({spoke - begin:.0f} of {timeout:g} s): {'; '.join(lines)}")
    except BaseException:
        placement.release()
        raise
    return placement


def _resources() -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return what the cluster has in total, and what is free."""
    return ray.cluster_resources(), ray.available_resources()


def _explain(unmet: Sequence[Demand], wanted: Sequence[Demand], timeout: float | None, device: Device) -> str:
    total, free = _resources()
    lines = ["this machine does not have what the run asks for:"]
    if timeout is not None:
        lines = [f"the cluster could not place everything within {timeout:g} s (a third of cluster.timeout):"]
    lines += [f"  - {demand.role}: {demand.count} x ({_asks(demand)}) not placed" for demand in unmet]
    lines += [f"  {line}" for line in shortages(wanted, unmet, total, free)]
    lines += [f"  {line}" for line in remedies(wanted, unmet, total, free, device)]
    return "\n".join(lines)


def _asks(demand: Demand) -> str:
    return _asks_for(demand.resources)


def _asks_for(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{v:g} {k}" for k, v in resources.items())


def shortages(
    wanted: Sequence[Demand], unmet: Sequence[Demand], total: Mapping[str, float], free: Mapping[str, float]
) -> list[str]:
    """A line for each resource that unmet demands ask for: what the run needs, what there is, and who has the rest."""
    needed, lines = totals(wanted), []
    for name in totals(unmet):
        amount, has = needed[name], total.get(name, 0.0)
        others = held_by_others(name, wanted, unmet, total, free)
        rest = f"; {amount - has:g} missing" if amount > has else f"; other jobs hold {others:g}" if others else ""
        line = f"{name}: the run needs {amount:g}, the cluster has {has:g} ({free.get(name, 0.0):g} free){rest}"
        lines.append(line)
    return lines


def held_by_others(
    name: str,
    wanted: Sequence[Demand],
    unmet: Sequence[Demand],
    total: Mapping[str, float],
    free: Mapping[str, float],
) -> float:
    """Return how much of a resource is neither free nor held by this run's own demands that were met."""
    own = totals([demand for demand in wanted if demand not in unmet]).get(name, 0.0)
    others = total.get(name, 0.0) - free.get(name, 0.0) - own
    return others if others > 1e-3 else 0.0  # bundles of nothing hold a thousandth of a CPU each


def remedies(
    wanted: Sequence[Demand],
    unmet: Sequence[Demand],
    total: Mapping[str, float],
    free: Mapping[str, float],
    device: Device,
) -> list[str]:
    """Say what to do: wait for others, ask for less, add nodes."""
    needed, lines = totals(wanted), []
    names = list(totals(unmet))
    missing = [name for name in names if needed[name] > total.get(name, 0.0)]
    held = [name for name in names if held_by_others(name, wanted, unmet, total, free)]
    if missing:
        add = "or add nodes; an engine's GPUs must be in one node" if device == "cuda" else "or add nodes"
        if "GPU" in missing:
            knobs = "rollout.engines, rollout.engine_options.tensor_parallel_size and learner.ranks"
            lines.append(f"lower {knobs} to fit the cluster, {add}")
        for name in [name for name in missing if name != "GPU"]:
            lines.append(f"lower {'the CPUs' if name == 'CPU' else name} in cluster.resources, {add}")
    elif held:
        lines.append(
            f"other jobs are using the missing {', '.join(held)}: wait until they end (with a larger "
            "cluster.timeout), or stop one (ray job list)"
        )
    else:
        lines.append(
            "the cluster has enough in total, but no single node has what one of these asks for: add larger nodes"
        )
    return lines
