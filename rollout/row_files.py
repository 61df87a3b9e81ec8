"""Parquet and JSONL files as blocks of rows: about 16 MiB each, read one at a time.

A new format is one class with what `RowFile` asks for, and an entry in `FORMATS`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

BLOCK_BYTES = 16 * 2**20
"""Aimed size of a block, uncompressed."""
MAX_LINE_BYTES = 256 * 2**20
"""A JSONL line above this is taken for a file that is no JSONL."""
READ_BUFFER = 2**20
"""Bytes that a Parquet column is read ahead: pages are streamed, a row group is never in memory whole."""

Row = dict[str, Any]
Loaded = Callable[[int], Row]
"""Row `i` of a loaded block. Raises ValueError for a row that cannot be decoded."""


class DataError(ValueError):
    """Data that cannot be used; says which file, which rows, and why."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one file that are read together."""

    rows: int
    nbytes: int
    """Uncompressed size of the columns in use, as the file states it."""
    start: int
    stop: int
    """Parquet: row groups `[start, stop)`. JSONL: bytes `[start, stop)`."""
    skip: int = 0
    """Parquet: rows of group `start` that come before this block, where a large group was cut."""


class RowFile(Protocol):
    path: Path
    columns: tuple[str, ...]
    """Names that exist in the file."""
    blocks: tuple[Block, ...]

    def load(self, block: Block) -> Loaded:
        """Read one block. Raises DataError."""


class ParquetRows:
    """A Parquet file: small row groups are joined to a block, large ones cut into several."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self.columns = tuple(file.schema_arrow.names)
            self.wanted = [name for name in self.columns if name in wanted]
            self.blocks = tuple(self._cut(file.metadata))

    def _cut(self, metadata: pq.FileMetaData) -> Iterator[Block]:
        schema = metadata.schema
        leaves = [i for i in range(len(schema)) if schema.column(i).path.split(".")[0] in self.wanted]
        start = rows = size = 0
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            group_size = sum(group.column(i).total_uncompressed_size for i in leaves)
            if rows and size + group_size > BLOCK_BYTES:
                yield Block(rows, size, start, g)
                start, rows, size = g, 0, 0
            rows, size = rows + group.num_rows, size + group_size
            if size > 2 * BLOCK_BYTES and rows == group.num_rows:
                each = max(1, rows * BLOCK_BYTES // size)
                for skip in range(0, rows, each):
                    n = min(each, rows - skip)
                    yield Block(n, size * n // rows, g, g + 1, skip)
                start, rows, size = g + 1, 0, 0
        if rows:
            yield Block(rows, size, start, metadata.num_row_groups)

    def load(self, block: Block) -> Loaded:
        first, last, seen = block.skip, block.skip + block.rows, 0
        parts: list[pa.RecordBatch] = []
        try:
            with pq.ParquetFile(self.path, buffer_size=READ_BUFFER, pre_buffer=False) as file:
                groups = range(block.start, block.stop)
                size = min(block.rows, 4096)
                for batch in file.iter_batches(size, list(groups), self.wanted, use_threads=False):
                    low, high = max(first - seen, 0), min(last - seen, batch.num_rows)
                    if low < high:
                        parts.append(batch.slice(low, high - low))
                    seen += batch.num_rows
                    if seen >= last:
                        break
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DataError(f"{self.path}: row groups {block.start} to {block.stop - 1} unreadable: {error}") from error
        table = pa.Table.from_batches(parts)
        if len(table) != block.rows:
            raise DataError(f"{self.path}: {block.rows} rows expected, {len(table)} read: changed since it was opened?")
        named = list(zip(table.column_names, table.columns, strict=True))
        return lambda i: {name: column[i].as_py() for name, column in named}


class JsonlRows:
    """A JSONL file: one object a line, indexed by byte offset every block. Row n is line n, counted from 0."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        self.path = path
        self.blocks = tuple(self._cut())
        self.columns = self._keys(set(wanted))

    def _cut(self) -> Iterator[Block]:
        with self.path.open("rb") as file:
            start, end = 0, _content_end(file)
            file.seek(0)
            while data := file.read(min(BLOCK_BYTES, end - start)):
                if not data.endswith(b"\n"):
                    data += file.readline(min(MAX_LINE_BYTES, end - start - len(data)))
                whole = data.endswith(b"\n")
                stop = start + len(data)
                if not whole and stop < end:
                    raise DataError(f"{self.path}: a line longer than {MAX_LINE_BYTES >> 20} MiB; one object a line?")
                yield Block(data.count(b"\n") + (not whole), len(data), start, stop)
                start = stop

    def _keys(self, wanted: set[str], lines: int = 1000) -> tuple[str, ...]:
        """Keys of the first `lines` lines, or of fewer if they have all that is wanted."""
        found: dict[str, None] = {}
        for block in self.blocks[:1]:
            row = self.load(block)
            for i in range(min(lines, block.rows)):
                with suppress(ValueError):  # refused, with its reason, when its turn comes
                    found.update(dict.fromkeys(row(i)))
                if wanted <= found.keys():
                    break
        return tuple(found)

    def load(self, block: Block) -> Loaded:
        try:
            with self.path.open("rb") as file:
                file.seek(block.start)
                data = file.read(block.stop - block.start)
        except OSError as error:
            raise DataError(f"{self.path}: unreadable: {error}") from error
        lines = data.removesuffix(b"\n").split(b"\n")
        if len(lines) != block.rows:
            raise DataError(
                f"{self.path}: {block.rows} lines expected, {len(lines)} read: changed since it was opened?"
            )
        return lambda i: _parse(lines[i])


def _content_end(file: BinaryIO) -> int:
    """Where the last line that is not blank ends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - READ_BUFFER))
    tail = file.read()
    return size - len(tail) + len(tail.rstrip())


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a line must be a JSON object, this is {type(row).__name__}")
    return row


FORMATS: dict[str, Callable[[Path, Sequence[str]], RowFile]] = {
    ".parquet": ParquetRows,
    ".jsonl": JsonlRows,
}
