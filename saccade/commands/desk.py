"""`saccade why-stuck` and `saccade scale`: ask a run that goes on, and tell it, through its desk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from saccade.observe.screen import say

OutputDir = Annotated[Path | None, typer.Argument(help="output_dir of the run; not needed for the only one.")]
Cluster = Annotated[str | None, typer.Option(help="Its Ray cluster: host:port. Default: the one on this machine.")]
OLD_SECONDS = 15.0
"""Age of a status above which the driver itself does not go on."""


def why_stuck(output_dir: OutputDir = None, address: Cluster = None) -> None:
    """Say what a run is doing, who or what it waits for, and since when.

    Example:  saccade why-stuck runs/shapes
    """
    from saccade.fleet.desk import last_status
    from saccade.pipeline.stuck import Status, why

    values, age = last_status(_desk(output_dir, address))
    if not values:
        say(Console(), "the run is just starting")
        return
    text = why(Status.of(dict(values)))
    if age > OLD_SECONDS:
        text = f"the driver has said nothing for {age:.0f} s: it is stopped, or its machine is. Before that:\n{text}"
    say(Console(), text)


def scale(
    engines: Annotated[int, typer.Option(min=1, help="Number of rollout engines from now on.")],
    output_dir: OutputDir = None,
    address: Cluster = None,
) -> None:
    """Add rollout engines to a run that goes on, or drain some: they finish the groups that they have.

    Engines for which the cluster has no room come as soon as it has. A resume starts as many as the configuration says.

    Example:  saccade scale runs/shapes --engines 8
    """
    from saccade.fleet.desk import ask_for

    ask_for(_desk(output_dir, address), engines)
    say(Console(), f"the run will have {engines} engine(s); saccade why-stuck shows them")


def _desk(output_dir: Path | None, address: str | None) -> Any:
    from saccade.fleet.desk import find_desk, joined

    joined(address)
    return find_desk(output_dir)
