"""Rows as Python has them, a list of dictionaries or a `datasets.Dataset`, -> a Parquet file as a run reads it.

Images of PIL are kept as PNG, encoded ones as they are, paths of files as what is in the files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.data.columns import KNOWN_NAMES, MEDIA_ROLES
from vlm.errors import UserError

BATCH = 1000
"""Rows of a data set that are taken at once."""
MEDIA_COLUMNS = tuple(name for role in MEDIA_ROLES for name in KNOWN_NAMES[role])


class RowsError(UserError, ValueError):
    """Rows cannot be used; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Rows that have become a table."""

    table: pa.Table
    prompt: str | None
    """The column that is known to hold prompts."""
    media: tuple[str, ...]

    @classmethod
    def of(cls, data: Any, named: Mapping[str, str | None]) -> Rows:
        """`named`: data.columns of the configuration. Raises RowsError."""
        wanted = [named.get("prompt"), *KNOWN_NAMES["prompt"]]
        media = (*MEDIA_COLUMNS, *(name for role in MEDIA_ROLES if (name := named.get(role))))
        table = _table(data, media)
        if not len(table):
            raise RowsError("it has no rows")
        prompt = next((name for name in wanted if name in table.column_names), None)
        return cls(table, prompt, tuple(name for name in table.column_names if name in media))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that TRL passes to rewards by name."""
        return tuple(name for name in self.table.column_names if name not in (self.prompt, *self.media))

    @property
    def conversations(self) -> str | None:
        """The column of the prompts, where they are lists of messages."""
        kind = None if self.prompt is None else self.table.schema.field(self.prompt).type
        return self.prompt if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)) else None

    def write(self, path: Path) -> None:
        """Beside it first, so that no file is ever half written."""
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(self.table, partial, row_group_size=BATCH)
        partial.replace(path)


def is_files(data: Any) -> bool:
    """A path or pattern, or several."""
    if isinstance(data, str | Path):
        return True
    return isinstance(data, list | tuple) and bool(data) and all(isinstance(item, str | Path) for item in data)


def _table(data: Any, media: Sequence[str]) -> pa.Table:
    if hasattr(data, "with_format") and hasattr(data, "column_names") and hasattr(data, "__len__"):
        stored = data.with_format("arrow")  # images encoded as they are stored, in the order of the data set
        parts = [pa.table(stored[start : start + BATCH]) for start in range(0, len(data), BATCH)]
        table = pa.concat_tables(parts).replace_schema_metadata(None) if parts else pa.table({})
        return _with_files_in(table, media)
    if isinstance(data, Mapping) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise RowsError(
            f"{type(data).__name__}: give a list of dictionaries, a datasets.Dataset, or files (of a stream: files)"
        )
    rows = [data[n] for n in range(len(data))]
    for n, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise RowsError(f"row {n} is not a dictionary but {type(row).__name__}")
    return _columns_of([{name: _plain(value, name in media) for name, value in row.items()} for row in rows])


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    arrays: dict[str, pa.Array] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays[name] = pa.array(_alike(values))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RowsError(f"column {name!r} cannot be stored: {error!s:.200}; give its values one type") from error
    return pa.table(arrays)


def _alike(values: list[Any]) -> list[Any]:
    """Messages whose contents are lists of parts in some and texts in others: of parts in all."""
    contents = [m.get("content") for value in values if isinstance(value, list) for m in value if isinstance(m, dict)]
    if len({isinstance(content, list) for content in contents if content is not None}) < 2:
        return values
    return [[_in_parts(m) for m in value] if isinstance(value, list) else value for value in values]


def _in_parts(message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _plain(value: Any, is_media: bool) -> Any:
    """A value as Parquet stores it."""
    if hasattr(value, "save") and hasattr(value, "convert"):  # an image of PIL
        return {"bytes": _png(value), "path": None}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, False) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, is_media) for inner in value]
    if isinstance(value, Path):
        value = str(value)
    if is_media and isinstance(value, str) and len(value) < 4096 and Path(value).is_file():
        return {"bytes": Path(value).read_bytes(), "path": value}
    return value.tolist() if hasattr(value, "tolist") else value


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except OSError:  # a mode that PNG has not, such as CMYK
        image.convert("RGB").save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def _with_files_in(table: pa.Table, media: Sequence[str]) -> pa.Table:
    """Media that a data set knows by the paths of their files, as what is in the files."""
    for n, name in enumerate(table.column_names):
        kind = table.schema.field(name).type
        inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if name in media and pa.types.is_struct(inner) and {"bytes", "path"} <= {f.name for f in inner}:
            table = table.set_column(n, name, pa.array([_read(v) for v in table[name].to_pylist()], kind))
    return table


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(item) for item in value]
    if isinstance(value, dict) and value["bytes"] is None and value["path"] and Path(value["path"]).is_file():
        return {**value, "bytes": Path(value["path"]).read_bytes()}
    return value
