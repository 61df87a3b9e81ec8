"""Brings up what runs on Ray for a run or an evaluation, and ends it whatever happens.

on_ray: connect (Ray, its head watched) ─▶ place ─▶ start_actors ─▶ ... ─▶ why did it end? ─▶ actors, places, Ray end
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from saccade.config.run_config import RunConfig
from saccade.fleet.actors import Actors, start_actors
from saccade.fleet.connect import connect
from saccade.fleet.create import Factory
from saccade.fleet.deaths import explain
from saccade.fleet.head import HeadWatch
from saccade.fleet.placement import Placement, place
from saccade.fleet.signals import stop_on_signals
from saccade.observe.display import Display
from vlm.adapter import MultimodalAdapter
from vlm.media.types import MediaKind


@dataclass
class Started:
    """Everything that runs on Ray for a run, as far as it has been started."""

    head: HeadWatch
    placement: Placement
    stop_requested: Callable[[], None]
    actors: Actors = field(default_factory=Actors)
    all_started: bool = False

    def check(self) -> None:
        """Called while waiting. Raises RunStopped if the user asked to stop, HeadLostError if Ray's head is gone,
        RunError if nobody of a kind is left."""
        self.stop_requested()
        self.head.check()
        self.actors.check()

    def start_actors(
        self, config: RunConfig, adapter: MultimodalAdapter, media_kinds: Sequence[MediaKind], *, training: bool
    ) -> None:
        factory = Factory(config, self.placement, adapter, media_kinds, training)
        self.actors = start_actors(factory, self.check)
        self.all_started = True


@contextmanager
def on_ray(config: RunConfig, address: str | None, display: Display, *, training: bool) -> Iterator[Started]:
    """Ray, and a place for every actor; ends them all. An error comes out as the death that it comes from."""
    with connect(config, address, display) as head, stop_on_signals(display) as stop_requested:
        started = None
        try:
            placement = place(
                config, training=training, grows=not head.local, say=display.phase, check_stop=stop_requested
            )
            started = Started(head, placement, stop_requested)
            yield started
        except Exception as error:
            asked = started.actors.questions() if started is not None and started.all_started else {}
            reason = explain(error, asked, head)
            if reason is error:
                raise
            raise reason from error
        finally:
            display.close()
            if started is not None:
                started.actors.shutdown()
                if not head.lost:  # which would have to release it
                    started.placement.release()
