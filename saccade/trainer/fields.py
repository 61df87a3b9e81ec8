"""The fields of another library's configuration object: which were read, and which of the others ask for something."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from saccade.config.synonyms import synonym_of

Knobs = dict[str, Any]
"""Dotted name -> value."""


class RefusedError(ValueError):
    """Why a field cannot be carried over."""


class Fields:
    """Reading a field says that it is honoured. What nobody has read by the end must be at its default."""

    def __init__(self, given: Any, defaults: Mapping[str, Any], name: str) -> None:
        """`given`: a dataclass instance, a mapping, or an object with attributes; `defaults`: of fields that it lacks;
        `name`: what the user calls it."""
        self._values = dict(_values(given))
        self._defaults = {**defaults, **dict(_declared(given))}
        self._read: set[str] = set()
        self._name = name

    def __getitem__(self, field: str) -> Any:
        self._read.add(field)
        value = self._values.get(field, self._defaults[field])
        return getattr(value, "value", value)  # of an enumeration

    def refused(self, honoured: Collection[str] = ()) -> list[str]:
        """One text for each field that asks for something and was not read. `honoured`: fields that ask for nothing
        more than what is done anyway."""
        return [self._refusal(field) for field in self._values if not self._asks_nothing(field, honoured)]

    def _asks_nothing(self, field: str, honoured: Collection[str]) -> bool:
        if field in self._read or field in honoured or field.startswith("_"):
            return True
        value, default = self._values[field], self._defaults.get(field)
        if not value and not default:
            return True
        return bool(value == default) or (default is None and _is_default(value))

    def _refusal(self, field: str) -> str:
        default = self._defaults.get(field)
        hint = f"; the nearest knob is {knob}" if (knob := synonym_of(field)) else ""
        return (
            f"{self._name}.{field}={self._values[field]!r}: it has no counterpart here; leave it at {default!r}{hint}"
        )


def _is_default(value: Any) -> bool:
    """Whether a dataclass, such as one that a configuration makes of None, is as it is made without arguments."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and bool(value == type(value)())


def _values(given: Any) -> Mapping[str, Any]:
    """A dataclass may hold more than its fields, such as what it found out about the device."""
    if dataclasses.is_dataclass(given):
        return {
            field.name: getattr(given, field.name) for field in dataclasses.fields(given) if hasattr(given, field.name)
        }
    return given if isinstance(given, Mapping) else vars(given)


def _declared(given: Any) -> Iterator[tuple[str, Any]]:
    """The defaults that a dataclass declares."""
    for field in dataclasses.fields(given) if dataclasses.is_dataclass(given) else ():
        if field.default is not dataclasses.MISSING:
            yield field.name, field.default
        elif field.default_factory is not dataclasses.MISSING:
            yield field.name, field.default_factory()
