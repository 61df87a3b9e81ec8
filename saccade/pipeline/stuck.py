"""Why is it stuck: who a run waits for and since when, in words, from what the driver knows.

Status (numbers and names, of one moment) ─▶ why(status) ─▶ the first line names who is awaited, the others say more
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

GOES_ON = 5.0
"""Seconds without progress up to which nothing is stuck."""
STORE_FULL = 0.9
"""Share of an object store above which it may be what holds a run up."""
DISK_FULL = 64 * 2**20
"""Bytes of free disk below which nothing can be written any more."""


@dataclass(frozen=True)
class GroupStatus:
    """A group in flight."""

    ref: str
    waits_for: str
    """The engine or the reward actor that has it, or what it needs before it can be sent."""
    node: str = ""
    seconds: float = 0.0
    """Since its last transition."""
    late: bool = False
    """Whether it was too old once, so that the step waits for it."""


@dataclass(frozen=True)
class Status:
    """A run at one moment."""

    step: int
    steps: int
    doing: str
    """The phase of the step: rollout, learn, sync, evaluate, checkpoint, ..."""
    seconds: float
    """Since that began."""
    idle: float
    """Seconds since anything began or ended."""
    silent: tuple[str, ...] = ()
    """Processes that did not answer just now whether they live."""
    away: tuple[str, ...] = ()
    """Members of pools that do not serve, each with its state and since when."""
    groups: dict[str, int] = field(default_factory=dict)
    """Groups in flight by state."""
    oldest: GroupStatus | None = None
    prompts: str = ""
    """Says why the next prompts are not there, if they are awaited."""
    enough_scored: bool = False
    """Whether as many groups are scored as a batch has."""
    stores: dict[str, float] = field(default_factory=dict)
    """Used share of the object store by node."""
    disk_free: int | None = None
    """Bytes free where the run writes."""
    blocked: str = ""
    """Where the driver's own code stands, if its loop does not answer."""
    members: tuple[str, ...] = ()
    """A line for each engine."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Status:
        """Make a status of what `to_dict` returned."""
        oldest = values["oldest"] and GroupStatus(**values["oldest"])
        lists = {name: tuple(values[name]) for name in ("silent", "away", "members")}
        return cls(**{**values, **lists, "oldest": oldest})


def why(status: Status) -> str:
    """Return in words who or what is awaited. The first line is the likeliest cause."""
    causes = list(_causes(status))
    if status.idle < GOES_ON and not status.blocked:
        causes.insert(0, "the run goes on")
    counts = ", ".join(f"{n} {state}" for state, n in status.groups.items() if n)
    head = f"step {status.step + 1} of {status.steps}: {status.doing} for {status.seconds:.0f} s"
    lines = [f"{head}; nothing began or ended for {status.idle:.0f} s", *causes]
    if status.oldest is not None:
        lines.append(f"the oldest group: {_group(status.oldest)}")
    if counts:
        lines.append(f"groups in flight: {counts}")
    return "\n".join([*causes[:1], *(line for line in lines if line not in causes[:1]), *status.members])


def _causes(status: Status) -> Iterator[str]:
    if status.blocked:
        yield f"the driver itself is blocked: {status.blocked}"
        return
    if status.disk_free is not None and status.disk_free < DISK_FULL:
        yield f"the disk of output_dir is full: {status.disk_free / 2**20:.0f} MiB are free"
    if status.silent:
        verb = "does not answer" if len(status.silent) == 1 else "do not answer"
        yield f"{', '.join(status.silent)} {verb}: stopped, or hangs"
    full = [f"{node} ({share:.0%})" for node, share in status.stores.items() if share > STORE_FULL]
    if full:
        yield f"the object store is full on {', '.join(full)}: groups and media do not fit; give Ray more of it"
    if status.away:
        yield f"awaited: {'; '.join(status.away)}"
    yield from _of_phase(status)


def _of_phase(status: Status) -> Iterator[str]:
    if status.doing == "learn":
        yield f"the learner computes the update of step {status.step + 1} for {status.seconds:.0f} s"
    elif status.doing == "sync":
        yield f"the weights are sent to the engines for {status.seconds:.0f} s"
    elif status.doing == "checkpoint":
        yield f"a checkpoint is written for {status.seconds:.0f} s"
    elif status.prompts:
        yield f"the next prompts are awaited: {status.prompts}"
    elif status.oldest is not None:
        gate = ", which was too old once: the batch is not sealed without it" if status.oldest.late else ""
        if status.enough_scored or not gate:
            yield f"{_group(status.oldest)}{gate}"
    else:
        yield "no group is in flight, and none is due: the staleness gate is closed until the next weights arrive"


def _group(group: GroupStatus) -> str:
    where = f" on node {group.node[:8]}" if group.node else ""
    return f"{group.ref} waits for {group.waits_for}{where} for {group.seconds:.0f} s"
