"""Signals that arrive at the worst moment."""

from __future__ import annotations

import io
import signal
import threading

import pytest
from rich.console import Console

from saccade.errors import RunStopped
from saccade.fleet.signals import stop_on_signals
from saccade.observe.display import SilentDisplay, TerminalDisplay


class SignalledWhileFlushing(io.StringIO):
    """A terminal during whose first flush the user presses Ctrl-C."""

    pressed = False

    def flush(self) -> None:
        super().flush()
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_a_line_is_printed_prints_that_line_once():
    terminal = SignalledWhileFlushing()
    display = TerminalDisplay(Console(file=terminal, width=200))
    with stop_on_signals(display) as check:
        display.phase("step 2")
        with pytest.raises(RunStopped):
            check()
    assert terminal.getvalue().splitlines() == [
        "step 2",
        "stopping: the state is saved first; a second Ctrl-C or SIGTERM stops at once",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_interrupts_and_the_former_handlers_come_back(number):
    former = signal.getsignal(number)
    terminal = io.StringIO()
    with stop_on_signals(TerminalDisplay(Console(file=terminal, width=200))) as check:
        check()
        signal.raise_signal(number)
        with pytest.raises(RunStopped):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert terminal.getvalue().splitlines()[-1] == "stopping at once: only what was saved before remains"
    assert signal.getsignal(number) is former
    assert not [t for t in threading.enumerate() if t.name == "announces a stop"]


def test_outside_the_main_thread_signals_are_left_alone():
    former = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with stop_on_signals(SilentDisplay()) as check:
            check()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [former]
