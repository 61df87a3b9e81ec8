"""What every section of the configuration is, and the short forms that its lists take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | Mapping) else value


ListOfOne = BeforeValidator(_listed)
"""A single text, or a single section, is taken for a list of one."""
