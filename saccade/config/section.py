"""What every section of the configuration is, and the short forms that some of its values take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | Mapping) else value


ListOfOne = BeforeValidator(_listed)
"""A single text, or a single section, is taken for a list of one."""


def _micro_batch(value: Any) -> int | str:
    """Positions as a number; memory as `<number> GiB`."""
    text = str(value)
    memory = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*GiB\s*", text, re.IGNORECASE)
    try:
        size = float(memory[1]) if memory else float(int(text))
    except ValueError:
        size = 0.0
    if isinstance(value, bool) or size <= 0:
        raise ValueError("should be a number of language positions, such as 8192, or memory, such as 12 GiB")
    return f"{size:.12g} GiB" if memory else int(size)


def _overlong(value: Any) -> float | str:
    if value in ("keep", "mask") and isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("should be keep, mask, or a share of the length limit: more than 0, and at most 1")
    return float(value)


MicroBatch = Annotated[int | str, PlainValidator(_micro_batch)]
Overlong = Annotated[float | str, PlainValidator(_overlong)]
