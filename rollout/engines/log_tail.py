"""Keep the last lines that a library and its child processes print. The output still goes to standard error.

A child that dies writes the reason only to its standard error. Children inherit descriptors 1 and 2.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_REDIRECT = threading.Lock()


class LogTail:
    """Keeps the last `lines` lines of children that were started inside `capture`, as long as they live."""

    def __init__(self, lines: int = 60) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._ended = threading.Event()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Send descriptors 1 and 2 of this process, and of children started meanwhile, through a pipe, which is copied
        to the original standard error. Only one capture at a time is possible in a process."""
        with _REDIRECT:
            sys.stdout.flush()
            sys.stderr.flush()
            former = os.dup(1), os.dup(2)
            read_end, write_end = os.pipe()
            threading.Thread(target=self._copy, args=(read_end, os.dup(2)), name="log-tail", daemon=True).start()
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            os.close(write_end)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for descriptor, saved in enumerate(former, start=1):
                    os.dup2(saved, descriptor)
                    os.close(saved)

    def _copy(self, read_end: int, out: int) -> None:
        with open(read_end, "rb", buffering=0) as source, open(out, "wb", buffering=0) as sink:
            partial = b""
            while block := source.read(65536):
                sink.write(block)
                *whole, partial = (partial + block).split(b"\n")
                self._lines.extend(line.decode(errors="replace") for line in whole)
            if partial:
                self._lines.append(partial.decode(errors="replace"))
        self._ended.set()

    def text(self, wait: float = 0.0) -> str:
        """Return the lines kept so far. Wait at most `wait` seconds until every child has closed its end."""
        self._ended.wait(wait)
        return "\n".join(self._lines)
