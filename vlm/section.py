"""The building blocks of a configuration's sections.

A section is a frozen dataclass that stands in the room which reads it. Pydantic validates it, and no room imports
pydantic: it asks a class for `__pydantic_config__`, and what stands in `Annotated` for a schema. Docstrings of fields
become the descriptions of knobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform, get_args

Class = TypeVar("Class")

CONFIG: Mapping[str, Any] = {"extra": "forbid", "validate_default": True, "allow_inf_nan": False}


@dataclass_transform(frozen_default=True)
def section(cls: type[Class]) -> type[Class]:
    """Makes a class a section: a frozen dataclass that refuses unknown keys and numbers that are not finite."""
    cls.__pydantic_config__ = dict(CONFIG)  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


@dataclass(frozen=True)
class Before:
    """Converts what is given before it is validated."""

    convert: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return {"type": "function-before", "function": _call(self.convert), "schema": handler(source)}


@dataclass(frozen=True)
class After:
    """Converts what was validated."""

    convert: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return {"type": "function-after", "function": _call(self.convert), "schema": handler(source)}


@dataclass(frozen=True)
class Parsed:
    """Validates and converts what is given, all by itself; raises ValueError."""

    convert: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return {"type": "function-plain", "function": _call(self.convert)}


class ByName:
    """A union of sections that differ in their `name`; the first is meant where none is given, and a text is a name."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        members = {member.name: member for member in get_args(source)}
        first = next(iter(members))

        def named(value: Any) -> Any:
            value = {"name": value} if isinstance(value, str) else value
            return {"name": first, **value} if isinstance(value, Mapping) else value

        choices = {name: handler(member) for name, member in members.items()}
        union = {"type": "tagged-union", "choices": choices, "discriminator": "name"}
        return {"type": "function-before", "function": _call(named), "schema": union}


def _call(function: Callable[[Any], Any]) -> dict[str, Any]:
    return {"type": "no-info", "function": function}


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | Mapping) or is_dataclass(value) else value


ListOfOne = Before(_listed)
"""A single text, or a single section, is taken for a list of one."""


def short(field: str) -> Before:
    """A section may be given by its `field` alone."""
    return Before(lambda value: {field: value} if isinstance(value, str | int | float) else value)


def first_field(section_class: type[Any]) -> str:
    """The field that a section's short form gives."""
    return fields(section_class)[0].name
