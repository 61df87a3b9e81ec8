"""The messages between two processes over a socket: JSON, with a tag for each value of another plain type. Standard
library only."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

MAX_DEPTH = 100
MAX_MESSAGE = 2**26
TEXTS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "float": (float, float.hex, float.fromhex),
    "complex": (complex, lambda c: [c.real.hex(), c.imag.hex()], lambda p: complex(*map(float.fromhex, p))),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "Decimal": (Decimal, str, Decimal),
    "Fraction": (Fraction, str, Fraction),
    "date": (date, date.isoformat, date.fromisoformat),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "timedelta": (timedelta, lambda d: [d.days, d.seconds, d.microseconds], lambda p: timedelta(*p)),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda p: range(*p)),
    "slice": (slice, lambda s: [s.start, s.stop, s.step], lambda p: slice(*p)),
}
"""Tag -> type, how its values are written, and how they are read."""
MANY: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class LinkEndedError(BaseException):
    """The process at the other end is gone."""


class Link:
    """Sends and receives messages. Values that are not plain go through `export` and `restore`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def send(self, *message: Any) -> None:
        body = json.dumps(message).encode("utf-8", "surrogatepass")
        self.connection.sendall(struct.pack(">Q", len(body)) + body)

    def receive(self) -> Any:
        (length,) = struct.unpack(">Q", self._exactly(8))
        if length > MAX_MESSAGE:
            raise LinkEndedError
        return json.loads(self._exactly(length).decode("utf-8", "surrogatepass"))

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = self.connection.recv(min(length - len(data), 2**16))
            except ConnectionError:
                piece = b""
            if not piece:
                raise LinkEndedError
            data += piece
        return bytes(data)

    def encode(self, value: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise RecursionError("nested too deeply")
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < 2**63 else {"t": "int", "v": hex(value)}
        for tag, (known, write, _) in TEXTS.items():
            if kind is known:
                return {"t": tag, "v": write(value)}
        for tag, known in MANY.items():
            if kind is known:
                return {"t": tag, "v": [self.encode(item, depth + 1) for item in value]}
        if kind is dict:
            pairs = [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]
            return {"t": "dict", "v": pairs}
        return self.export(value, depth)

    def decode(self, form: Any) -> Any:
        if not isinstance(form, dict):
            return form
        tag, value = form["t"], cast("Any", form.get("v"))
        if tag == "int":
            return int(value, 16)
        if tag in TEXTS:
            return TEXTS[tag][2](value)
        if tag in MANY:
            return MANY[tag](self.decode(item) for item in value)
        if tag == "dict":
            return {self.decode(k): self.decode(v) for k, v in value}
        return self.restore(form)

    def export(self, value: Any, depth: int) -> Any:
        raise NotImplementedError

    def restore(self, form: Mapping[str, Any]) -> Any:
        raise NotImplementedError
