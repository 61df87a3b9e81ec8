"""Find the elements of a JSON array in a file, in one pass. Memory holds a few megabytes and one element.

The bytes are read as Latin-1, one character each. JSON's own signs are ASCII, and no byte of a longer UTF-8 character
is one of them. So positions are byte offsets, and an element with damaged text is still found.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import BinaryIO

CHUNK_BYTES = 4 * 2**20
MAX_ELEMENT_BYTES = 256 * 2**20
"""A file with a larger element is damaged."""

_DECODER = json.JSONDecoder()
_BLANKS = frozenset(" \t\r\n")
_ENDS = _BLANKS | {",", "]"}
_BYTE_ORDER_MARK = "\xef\xbb\xbf"


class ElementError(ValueError):
    """The bytes are not an array or part of one; the message says where."""


def array_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of the elements of an array. The file must contain nothing else. Raises ElementError."""
    window = _Window(file)
    at = window.skip_blanks(len(_BYTE_ORDER_MARK) if window.text.startswith(_BYTE_ORDER_MARK) else 0)
    if window.text[at : at + 1] != "[":
        raise window.error(at, "expected [")
    at = window.skip_blanks(at + 1)
    if window.text[at : at + 1] != "]":
        at = yield from _spans(window, at)
    if window.text[at : at + 1] != "]":
        raise window.error(at, "expected , or ]")
    at = window.skip_blanks(at + 1)
    if at < len(window.text):
        raise window.error(at, "there is something after the end of the array")


def element_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of a list of elements without brackets around it. Raises ElementError."""
    window = _Window(file)
    at = yield from _spans(window, 0)
    if at < len(window.text):
        raise window.error(at, "expected ,")


def _spans(window: _Window, at: int) -> Generator[tuple[int, int], None, int]:
    """Yield elements with commas between them, starting at `at`. Returns the position after the last one."""
    while True:
        at = window.forget_before(window.skip_blanks(at))
        stop = window.end_of_value(at)
        yield window.offset + at, window.offset + stop
        at = window.skip_blanks(stop)
        if window.text[at : at + 1] != ",":
            return at
        at += 1


class _Window:
    """The part of a file that is in memory. Positions are relative to `text`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.text = ""
        self.offset = file.tell()
        """The offset of `text` in the file."""
        self._more(0)

    def _more(self, needed_from: int) -> bool:
        """Read more: as much again as is in use. Returns False at the end of the file."""
        in_use = len(self.text) - needed_from
        if in_use > MAX_ELEMENT_BYTES:
            raise self.error(needed_from, f"an element longer than {MAX_ELEMENT_BYTES >> 20} MiB")
        data = self._file.read(max(CHUNK_BYTES, in_use))
        self.text += data.decode("latin-1")
        return bool(data)

    def skip_blanks(self, at: int) -> int:
        """Return the next position that is not blank. It is the end of the text only at the end of the file."""
        while True:
            while at < len(self.text) and self.text[at] in _BLANKS:
                at += 1
            if at < len(self.text) or not self._more(at):
                return at

    def forget_before(self, at: int) -> int:
        """Drop the text before `at` from time to time. Returns the new position of `at`."""
        if at < CHUNK_BYTES:
            return at
        self.text, self.offset = self.text[at:], self.offset + at
        return 0

    def end_of_value(self, at: int) -> int:
        while True:
            try:
                _, stop = _DECODER.raw_decode(self.text, at)
            except RecursionError as error:
                raise self.error(at, "nested too deeply") from error
            except json.JSONDecodeError as error:
                if not self._more(at):
                    raise self.error(error.pos, error.msg) from error
            else:
                # A value that ends where the text ends may continue after it: 12 is the beginning of 12.3.
                if self.text[stop : stop + 1] in _ENDS or not self._more(at):
                    return stop

    def error(self, at: int, message: str) -> ElementError:
        return ElementError(f"byte {self.offset + at}: {message}")
