"""Read Parquet files in blocks of rows, in bounded memory, whatever size a file unpacks to.

metadata ──▶ blocks ──▶ batches of rows: equal texts stay one ──▶ texts of their own, if that is little ──▶ rows
    └─▶ refused, unread: what unpacks to too much
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.data import formats as row_files
from rollout.data.columns import field_names, is_read
from rollout.data.formats import READ_BUFFER, DataError, Loaded, Row, RowBlock

MIN_ROW_BYTES = 64
"""The least bytes that a row counts: runs of equal values state almost none."""
UNPACKED_BYTES = 64 * 2**20
UNPACKED_TIMES = 100
"""A column of a row group that unpacks to more than UNPACKED_BYTES, and to more than UNPACKED_TIMES its size in the
file, is not unpacked. Useful data never come near both limits."""
SMALLER_GROUPS = (
    "if the data are good, rewrite the file with smaller row groups: "
    "pq.write_table(pq.read_table(FILE), NEW, row_group_size={})"
)
"""The advice for good data whose row groups are too large; `pq` is pyarrow.parquet."""
DECODED_BYTES = 256 * 2**20
"""Memory limit for the rows of a block, and for one row."""
SHAREABLE = {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY", "BIT_PACKED"}
"""Encodings of texts that Arrow can read without copying each text."""


class ParquetRows:
    """A Parquet file. Small row groups are joined into one block, and large ones are cut into several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self._metadata, self._schema = file.metadata, file.schema_arrow
            self._top = tuple(file.schema_arrow.names)
            fields = field_names(_fields(file.schema_arrow))
            self.columns = tuple(fields) if file.metadata.num_rows else ()
        self._selected: list[str] = []
        self._leaves: list[int] = []
        """Columns of values that belong to the selected columns."""
        self._shared: list[str] = []

    def select(self, columns: Sequence[str]) -> tuple[RowBlock, ...]:
        self._selected = [name for name in self._top if is_read(name, columns)]
        schema = self._metadata.schema
        paths = [schema.column(i).path for i in range(len(schema))]
        self._leaves = [i for i, path in enumerate(paths) if any(is_read(name, [path]) for name in self._selected)]
        self._shared = [schema.column(i).path for i in self._leaves if self._shareable(i)]
        return tuple(self._cut())

    def _cut(self) -> Iterator[RowBlock]:
        metadata = self._metadata
        start = rows = size = 0
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            group_size = sum(group.column(i).total_uncompressed_size for i in self._leaves)
            group_size = max(group_size, group.num_rows * MIN_ROW_BYTES)
            if rows and (size + group_size > row_files.BLOCK_BYTES or self._bomb(g)):
                yield RowBlock(rows, size, start, g)
                start, rows, size = g, 0, 0
            if self._bomb(g):
                yield RowBlock(group.num_rows, 0, g, g + 1)
                start = g + 1
                continue
            rows, size = rows + group.num_rows, size + group_size
            if size > 2 * row_files.BLOCK_BYTES and rows == group.num_rows:
                each = max(1, rows * row_files.BLOCK_BYTES // size)
                for skip in range(0, rows, each):
                    n = min(each, rows - skip)
                    yield RowBlock(n, size * n // rows, g, g + 1, skip)
                start, rows, size = g + 1, 0, 0
        if rows:
            yield RowBlock(rows, size, start, metadata.num_row_groups)

    def _shareable(self, leaf: int) -> bool:
        """Return whether equal texts of a column can stay one text in memory, as in the file, until a row is read. For
        large values such as images, the search for equal ones costs more than it saves."""
        column = self._metadata.schema.column(leaf)
        if column.physical_type != "BYTE_ARRAY" or column.converted_type not in ("UTF8", "NONE"):
            return False
        chunks = [self._metadata.row_group(g).column(leaf) for g in range(self._metadata.num_row_groups)]
        small = all(chunk.total_uncompressed_size <= 2 * row_files.BLOCK_BYTES for chunk in chunks)
        return small and all(SHAREABLE.issuperset(chunk.encodings) for chunk in chunks)

    def _bomb(self, group: int) -> str:
        """Explain why a row group is not unpacked; empty if it is."""
        rows = self._metadata.row_group(group).num_rows
        for i in self._leaves:
            column = self._metadata.row_group(group).column(i)
            elements = column.num_values - rows  # of lists, 4 bytes each
            packed, unpacked = column.total_compressed_size, max(column.total_uncompressed_size, 4 * elements)
            if unpacked > max(UNPACKED_BYTES, UNPACKED_TIMES * packed):
                reason = (
                    f"{column.path_in_schema!r} of row group {group} unpacks from {packed:,} to {unpacked:,} "
                    f"bytes, more than the limit of {UNPACKED_BYTES >> 20} MiB and {UNPACKED_TIMES} times the "
                    "packed size"
                )
                fewer = rows * UNPACKED_BYTES // (2 * unpacked)
                return f"{reason}; {SMALLER_GROUPS.format(fewer)}" if fewer else reason
        return ""

    def load(self, block: RowBlock) -> Loaded:
        if bomb := self._bomb(block.start):
            return _refusing(bomb)
        try:
            parts = self._read(block)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DataError(f"{self.path}: row groups {block.start} to {block.stop - 1} unreadable: {error}") from error
        if parts is None:
            return _refusing(f"its block of {block.rows} rows takes more than {DECODED_BYTES >> 20} MiB")
        ends = list(accumulate(len(part) for part in parts))
        if ends[-1:] != [block.rows]:
            found = ends[-1] if ends else 0
            raise DataError(
                f"{self.path}: expected {block.rows} rows, read {found}; did the file change after it was opened?"
            )

        def row(i: int) -> Row:
            part = bisect_right(ends, i)
            return _row(parts[part], i - ends[part] + len(parts[part]))

        return row

    def _read(self, block: RowBlock) -> list[pa.RecordBatch] | None:
        """Read the rows of a block; None if they take too much memory."""
        first, last, seen, held = block.skip, block.skip + block.rows, 0, 0
        groups = list(range(block.start, block.stop))
        parts: list[pa.RecordBatch] = []
        with pq.ParquetFile(self.path, buffer_size=READ_BUFFER, pre_buffer=False, read_dictionary=self._shared) as file:
            for batch in file.iter_batches(self._batch_rows(block), groups, self._selected, use_threads=False):
                low, high = max(first - seen, 0), min(last - seen, batch.num_rows)
                if low < high:
                    part, nbytes = self._unshared(batch.slice(low, high - low), held)
                    parts, held = [*parts, part], held + nbytes
                seen += batch.num_rows
                if seen >= last:
                    break
                if held > DECODED_BYTES:
                    return None
        return parts

    def _unshared(self, batch: pa.RecordBatch, held: int) -> tuple[pa.RecordBatch, int]:
        """Return `batch` with its own copy of each text, if that is smaller than the shared texts or small anyway; and
        its size."""
        columns, nbytes = [], 0
        for column, name in zip(batch.columns, batch.schema.names, strict=True):
            size = _decoded_bytes(column)
            if size <= max(column.nbytes, 4 * row_files.BLOCK_BYTES - held - nbytes):
                columns.append(_cast(column, self._schema.field(name).type))
                nbytes += size
            else:
                columns.append(column)
        return pa.RecordBatch.from_arrays(columns, names=batch.schema.names), nbytes

    def _batch_rows(self, block: RowBlock) -> int:
        """Return how many rows to decode at once: few if each may be a copy of a large text, or of most of the text
        before it."""
        rows = min(block.rows, 4096)
        for g in range(block.start, block.stop):
            for leaf in self._leaves:
                chunk = self._metadata.row_group(g).column(leaf)
                if chunk.path_in_schema not in self._shared and chunk.has_dictionary_page:
                    rows = min(rows, max(1, DECODED_BYTES // dictionary_bytes(self.path, chunk)))
                if "DELTA_BYTE_ARRAY" in chunk.encodings:
                    rows = min(rows, 16)
        return rows


def _fields(schema: pa.Schema | pa.StructType) -> dict[str, Any]:
    """Return column -> its fields, for columns that are structs."""
    return {field.name: _fields(field.type) if pa.types.is_struct(field.type) else None for field in _each(schema)}


def _each(schema: pa.Schema | pa.StructType) -> list[pa.Field]:
    return [schema.field(i) for i in range(len(schema.names))]


def dictionary_bytes(path: Path, chunk: Any) -> int:
    """Return the unpacked size of the dictionary of a column of a row group. The page's header begins with three
    integers in Thrift's compact form: the kind of the page, its unpacked size, and its packed size."""
    with path.open("rb") as file:
        file.seek(chunk.dictionary_page_offset)
        header = file.read(64)
    values, at = [], 0
    for _ in range(2):
        number, shift, at = 0, 0, at + 1
        while header[at] & 0x80:
            number, shift, at = number | (header[at] & 0x7F) << shift, shift + 7, at + 1
        number, at = number | header[at] << shift, at + 1
        values.append(number >> 1)
    return max(1, min(values[1], chunk.total_uncompressed_size))


def _refusing(reason: str) -> Loaded:
    def refuse(i: int) -> Row:
        raise ValueError(reason)

    return refuse


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast `array`. It stays unchanged if Arrow cannot cast it (texts as views), or casts it wrongly (columns of
    nulls)."""
    if array.type == kind:
        return array
    try:
        made = array.cast(kind)
        made.validate()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return array
    return made


def _row(batch: pa.RecordBatch, i: int) -> Row:
    """Convert a row to Python values. Raises ValueError if a value is too large."""
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if (size := _decoded_bytes(column.slice(i, 1))) > DECODED_BYTES:
            raise ValueError(f"{name!r} takes {size:,} bytes; the limit of a row is {DECODED_BYTES >> 20} MiB")
        values[name] = column[i].as_py()
    return values


def _decoded_bytes(array: pa.Array) -> int:
    """Return the size of an array in which each value has its own copy of its text."""
    if isinstance(array, pa.DictionaryArray):
        try:
            lengths = pc.binary_length(array.dictionary)
        except pa.ArrowNotImplementedError:  # numbers
            return int(array.nbytes)
        return pc.sum(lengths.take(array.indices)).as_py() or 0
    if isinstance(array, pa.StructArray):
        return sum(map(_decoded_bytes, array.flatten()))
    if isinstance(array, pa.MapArray):
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_decoded_bytes(part.slice(start, stop - start)) for part in (array.keys, array.items))
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return _decoded_bytes(array.flatten())
    return int(array.nbytes)
