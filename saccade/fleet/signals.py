"""Ctrl-C and SIGTERM: the first asks the run to stop, the second interrupts it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from saccade.errors import RunStopped
from saccade.observe.display import Display


@contextmanager
def stop_on_signals(display: Display) -> Iterator[Callable[[], None]]:
    """Turn the first SIGINT or SIGTERM into RunStopped at the next safe point; a second one raises KeyboardInterrupt.

    Yields the function that raises RunStopped. Outside the main thread signals are left alone."""
    requested = False
    said: SimpleQueue[str | None] = SimpleQueue()

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        if requested:
            said.put("stopping at once: only what was saved before remains")
            raise KeyboardInterrupt
        requested = True
        said.put("stopping: the state is saved first; a second Ctrl-C or SIGTERM stops at once")

    def announce() -> None:
        # In a thread of its own: a handler runs in the middle of whatever the main thread does. In the middle of the
        # display's printing it would write what is buffered a second time; `SimpleQueue.put` is made for such places.
        while (text := said.get()) is not None:
            display.phase(text)

    def check() -> None:
        if requested:
            raise RunStopped

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    announcer = threading.Thread(target=announce, name="announces a stop", daemon=True)
    announcer.start()
    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        said.put(None)
        announcer.join()
