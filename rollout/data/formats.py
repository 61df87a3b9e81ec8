"""Read files in blocks of rows of about 16 MiB, one at a time. JSONL and JSON are here, Parquet is in
`parquet_rows.py`.

A new format is one class that implements `RowFile`, and an entry in `rows.FORMATS`.
"""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rollout.data.columns import field_names
from rollout.data.json_array import ElementError, array_spans, element_spans
from vlm.errors import UserError

BLOCK_BYTES = 16 * 2**20
"""Target size of a block, uncompressed."""
MAX_LINE_BYTES = 256 * 2**20
"""A file with a longer line is not JSONL."""
READ_BUFFER = 2**20
"""Bytes of a Parquet column that are read ahead. Pages are streamed, so a row group is never in memory as a whole."""
ROWS_FOR_KEYS = 1000
"""How many rows at the beginning of a JSON or JSONL file are read for its columns."""

Row = dict[str, Any]
Loaded = Callable[[int], Row]
"""Returns row `i` of a loaded block. Raises ValueError if the row cannot be decoded."""


class DataError(UserError, ValueError):
    """The data cannot be used; the message says which file, which rows, and why."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive rows of one file that are read together."""

    rows: int
    nbytes: int
    """Uncompressed size of the columns in use, as the file states it."""
    start: int
    stop: int
    """Parquet: row groups `[start, stop)`. JSONL, JSON: bytes `[start, stop)`."""
    skip: int = 0
    """Parquet: how many rows of group `start` come before this block, if a large group was cut."""


class RowFile(Protocol):
    path: Path
    columns: tuple[str, ...]
    """Names of the file's columns; empty if it has no rows. Each struct is followed by its fields: `struct.field`."""

    def select(self, columns: Sequence[str]) -> tuple[RowBlock, ...]:
        """Read only these columns from now on, if the format can. Returns the file's blocks."""

    def load(self, block: RowBlock) -> Loaded:
        """Read one block. Raises DataError."""


class _JsonRows(ABC):
    """The common part of JSONL and JSON files: rows are objects in ranges of bytes. A subclass finds the ranges."""

    unit = ""
    """The word for rows in error messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._blocks = tuple(self._cut())
        self.columns = self._keys()

    @abstractmethod
    def _cut(self) -> Iterator[RowBlock]:
        """Cut the file into blocks. Raises DataError if the file is not of the format."""

    @abstractmethod
    def _rows(self, data: bytes) -> list[bytes]:
        """Return the rows in a block's bytes. Raises ElementError."""

    def _keys(self) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for block in self._blocks[:1]:
            row = self.load(block)
            for i in range(min(ROWS_FOR_KEYS, block.rows)):
                with suppress(ValueError):  # refused, with its reason, when its turn comes
                    found.update(dict.fromkeys(field_names(row(i))))
        if self._blocks and not found:
            raise DataError(f"{self.path}: no JSON object with keys among the first {self.unit}")
        return tuple(found)

    def select(self, columns: Sequence[str]) -> tuple[RowBlock, ...]:
        return self._blocks

    def load(self, block: RowBlock) -> Loaded:
        try:
            with self.path.open("rb") as file:
                file.seek(block.start)
                rows = self._rows(file.read(block.stop - block.start))
        except (OSError, ElementError) as error:
            raise DataError(f"{self.path}: unreadable: {error}; did the file change after it was opened?") from error
        if len(rows) != block.rows:
            raise DataError(
                f"{self.path}: expected {block.rows} {self.unit}, read {len(rows)}; did the file change after it "
                "was opened?"
            )
        return lambda i: _parse(rows[i])


class JsonlRows(_JsonRows):
    """A JSONL file: one object per line. The index holds the byte offset of each block. Row n is line n, counted from
    0."""

    unit = "lines"

    def _cut(self) -> Iterator[RowBlock]:
        with self.path.open("rb") as file:
            start, end = 0, _content_end(file)
            file.seek(0)
            while data := file.read(min(BLOCK_BYTES, end - start)):
                if not data.endswith(b"\n"):
                    data += file.readline(min(MAX_LINE_BYTES, end - start - len(data)))
                whole = data.endswith(b"\n")
                stop = start + len(data)
                if not whole and stop < end:
                    raise DataError(
                        f"{self.path}: a line is longer than {MAX_LINE_BYTES >> 20} MiB; expected one object per line"
                    )
                yield RowBlock(data.count(b"\n") + (not whole), len(data), start, stop)
                start = stop

    def _rows(self, data: bytes) -> list[bytes]:
        return data.removesuffix(b"\n").split(b"\n")


class JsonArrayRows(_JsonRows):
    """A JSON file that is one array of objects. The index holds the byte offset of each block. Row n is element n,
    counted from 0."""

    unit = "elements"

    def _cut(self) -> Iterator[RowBlock]:
        rows = start = stop = 0
        with self.path.open("rb") as file:
            try:
                for first, last in array_spans(file):
                    if rows and last - start > BLOCK_BYTES:
                        yield RowBlock(rows, stop - start, start, stop)
                        rows = 0
                    start, rows, stop = first if not rows else start, rows + 1, last
            except ElementError as error:
                raise DataError(f"{self.path}: not a readable JSON array: {error}") from error
        if rows:
            yield RowBlock(rows, stop - start, start, stop)

    def _rows(self, data: bytes) -> list[bytes]:
        return [data[first:last] for first, last in element_spans(io.BytesIO(data))]


def _content_end(file: BinaryIO) -> int:
    """Return the end of the last line that is not blank."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - READ_BUFFER))
    tail = file.read()
    return size - len(tail) + len(tail.rstrip())


def _parse(row: bytes) -> Row:
    try:
        value = json.loads(row)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, this is a {type(value).__name__}")
    return value


def open_json(path: Path) -> RowFile:
    """Open a `.json` file: one array of objects, or one object per line, since some JSONL files have this name."""
    with path.open("rb") as file:
        beginning = file.read(READ_BUFFER).removeprefix(b"\xef\xbb\xbf").lstrip()
    return JsonArrayRows(path) if beginning.startswith(b"[") else JsonlRows(path)
