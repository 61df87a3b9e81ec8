"""Rows of Parquet and JSONL files by number, with bounded memory.

    file ──▶ blocks (about 16 MiB of consecutive rows) ──▶ loaded one at a time, the latest ones cached ──▶ row

Only the index of blocks is held for the whole data set: a few numbers per 16 MiB.
"""

from __future__ import annotations

import difflib
import glob
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

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


class RowRefusedError(ValueError):
    """One row that cannot be used. `kind` is a few fixed words to count by, the message tells the rest."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


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
            start = 0
            while data := file.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += file.readline(MAX_LINE_BYTES)
                if len(data) >= MAX_LINE_BYTES and not data.endswith(b"\n"):
                    raise DataError(f"{self.path}: a line longer than {MAX_LINE_BYTES >> 20} MiB; one object a line?")
                content = data.rstrip() if len(data) < BLOCK_BYTES else data  # blank lines at the end are no rows
                if content:
                    rows = content.count(b"\n") + (not content.endswith(b"\n"))
                    yield Block(rows, len(content), start, start + len(content))
                start += len(data)

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


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a line must be a JSON object, this is {type(row).__name__}")
    return row


OPENERS: dict[str, Callable[[Path, Sequence[str]], RowFile]] = {
    ".parquet": ParquetRows,
    ".jsonl": JsonlRows,
}


class RowStore:
    """All rows of several files under one numbering, in the order of the patterns."""

    def __init__(self, patterns: Sequence[str], columns: Sequence[str], cache_bytes: int) -> None:
        """Raises DataError with every missing file and column at once."""
        problems: list[str] = []
        paths = _resolve(patterns, problems)
        self.files: list[RowFile] = []
        for path in paths:
            file = _open(path, columns, problems)
            if file is not None:
                self.files.append(file)
        if not problems and not any(file.blocks for file in self.files):
            problems.append(f"no rows in {', '.join(patterns) or 'an empty list of files'}")
        if problems:
            raise DataError("\n  - ".join([f"{len(problems)} problem(s) with the data:", *problems]))
        self.names = _short_names([file.path for file in self.files])
        self.blocks = [block for file in self.files for block in file.blocks]
        self.rows_of_files = [sum(block.rows for block in file.blocks) for file in self.files]
        self._file_starts = [0, *accumulate(self.rows_of_files)]
        self._block_starts = [0, *accumulate(block.rows for block in self.blocks)]
        self._file_of_block = [n for n, file in enumerate(self.files) for _ in file.blocks]
        self._cache: OrderedDict[int, Loaded] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes
        self.blocks_loaded = 0
        """Blocks read from disk so far; re-reads count again."""

    def __len__(self) -> int:
        return self._file_starts[-1]

    def locate(self, row: int) -> tuple[int, int]:
        """`(file number, row within the file)`."""
        if not 0 <= row < len(self):
            raise DataError(f"row {row} asked for, the data have {len(self)} rows")
        file = bisect_right(self._file_starts, row) - 1
        return file, row - self._file_starts[file]

    def uid(self, row: int) -> str:
        file, within = self.locate(row)
        return f"{self.names[file]}:{within}"

    def read(self, row: int) -> Row:
        """The row's columns as Python values. Raises RowRefusedError for a damaged row, DataError for its file."""
        number = bisect_right(self._block_starts, row) - 1
        loaded = self._cache.get(number)
        if loaded is None:
            loaded = self._load(number)
        self._cache.move_to_end(number)
        try:
            return loaded(row - self._block_starts[number])
        except ValueError as error:
            raise RowRefusedError("unreadable row", f"the row cannot be decoded: {error}") from error

    def _load(self, number: int) -> Loaded:
        block = self.blocks[number]
        while self._cache and self._cached_bytes + block.nbytes > self._cache_bytes:
            evicted, _ = self._cache.popitem(last=False)
            self._cached_bytes -= self.blocks[evicted].nbytes
        loaded = self.files[self._file_of_block[number]].load(block)
        self._cache[number] = loaded
        self._cached_bytes += block.nbytes
        self.blocks_loaded += 1
        return loaded


def _resolve(patterns: Sequence[str], problems: list[str]) -> list[Path]:
    """Files behind paths and globs, in order; what matches nothing or twice is added to `problems`."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        name = str(Path(pattern).expanduser())
        is_file = Path(name).exists()
        matches = [name] if is_file else sorted(glob.glob(name, recursive=True))
        if not matches:
            problems.append(f"{pattern}: no such file" + (" (nothing matches)" if glob.has_magic(name) else ""))
        for match in matches:
            path = Path(match).resolve()
            if path in found:
                problems.append(f"{match}: named twice, by {found[path]!r} and {pattern!r}")
            found[path] = pattern
    return list(found)


def _open(path: Path, columns: Sequence[str], problems: list[str]) -> RowFile | None:
    if path.is_dir():
        problems.append(f"{path}: is a directory; name its files, as in {path}/*.parquet")
        return None
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        problems.append(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(OPENERS)}")
        return None
    try:
        file = opener(path, columns)
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{path}: unreadable: {error}")
        return None
    except DataError as error:
        problems.append(str(error))
        return None
    for column in columns:
        if file.blocks and column not in file.columns:
            problems.append(f"{path}: no column {column!r}; it has {', '.join(_nearest_first(column, file.columns))}")
    return file


def _nearest_first(name: str, known: Sequence[str]) -> list[str]:
    return sorted(known, key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio())


def _short_names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many parent folders as it takes to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
