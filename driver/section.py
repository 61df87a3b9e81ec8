"""What every section of the configuration is, and the short forms that its lists take."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


ListOfOne = BeforeValidator(_listed)
"""A single text is taken for a list of one."""
