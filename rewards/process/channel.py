"""Exchange Python objects between a reward actor and its child process over a socket: 8 bytes of length, then a pickle.

Both ends run this project's code on one machine, and only they hold the socket pair.
"""

from __future__ import annotations

import pickle
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct("<Q")


class Channel:
    """One end of the channel. With a deadline (of `time.monotonic()`), both calls raise TimeoutError; without one, they
    wait."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: Any, deadline: float | None = None) -> None:
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._limit(deadline)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive(self, deadline: float | None = None) -> Any:
        """Return the next message.

        Raises:
            EOFError: the other end is closed.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        return pickle.loads(self._exactly(length, deadline))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, length: int, deadline: float | None) -> bytearray:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            self._limit(deadline)
            count = self._socket.recv_into(view)
            if count == 0:
                raise EOFError("the other end of the channel is closed")
            view = view[count:]
        return buffer

    def _limit(self, deadline: float | None) -> None:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError("deadline passed")
        self._socket.settimeout(remaining)
