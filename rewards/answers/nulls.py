"""Remove nulls that nobody wrote: tables pad rows with them. Pure functions.

Parquet       every struct of a column has the keys of all of them: `[{input: "1", output: "1", code: null}]`
pandas        a missing number is NaN, and so is a missing anything
tables        short lists are filled up: `["x", null]`, `[{input: "1", output: "1"}, {input: null, output: null}]`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: Any) -> bool:
    """Return whether a value is null, or an object with only nulls. An empty object is not blank: somebody wrote it."""
    return is_null(value) or (isinstance(value, Mapping) and len(value) > 0 and all(map(is_blank, value.values())))


def without_blanks(value: Any) -> Any:
    """Remove keys with blank values from `value`, at any depth. Items of lists stay, since their number counts."""
    if isinstance(value, Mapping):
        return {key: without_blanks(item) for key, item in value.items() if not is_blank(item)}
    return [without_blanks(item) for item in value] if isinstance(value, list | tuple) else value
