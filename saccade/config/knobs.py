"""Every knob of a run: its name, default, and meaning, read from the sections."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from saccade.config.run_fields import RunFields
from vlm.section import first_field


@dataclass(frozen=True)
class Knob:
    """A field that holds no section."""

    name: str
    """With dots: algorithm.loss.low."""
    default: Any
    """MISSING where one must be given."""
    text: str
    """The meaning of the knob."""
    choices: tuple[Any, ...] = ()
    """The allowed values, if they can be listed."""


@cache
def knobs() -> dict[str, Knob]:
    """All, by name, in order."""
    return {knob.name: knob for knob in _knobs(RunFields, "")}


@cache
def choices() -> dict[str, str]:
    """The sections inside of sections, and those with a short form -> the field that the short form gives."""
    return {"algorithm": "name", **dict(_choices(RunFields, ""))}


@cache
def unions() -> dict[str, tuple[str, ...]]:
    """Unions of sections -> the names of their members."""
    named = {name.removesuffix(".name"): knob for name, knob in knobs().items() if name.endswith(".name")}
    return {name: knob.choices for name, knob in named.items() if "." in name}


def value_of(config: RunFields, knob: str) -> Any:
    """Return the value of a knob; None if its section is missing, or is another member of its union."""
    node: Any = config
    for part in knob.split("."):
        node = getattr(node, part, None)
    return node


def default_of(config: RunFields, knob: str) -> Any:
    """A knob's default, in the section that `config` has there."""
    parent, _, name = knob.rpartition(".")
    section = value_of(config, parent) if parent else None
    if section is not None and name in (own := {f.name: f for f in fields(section)}):
        return _default(own[name])
    return knobs()[knob].default


def _knobs(kind: type[Any], prefix: str) -> Iterator[Knob]:
    hints, texts = get_type_hints(kind, include_extras=True), docstrings(kind)
    for name, default in _fields(kind):
        members = sections_in(hints[name])
        if not members:
            yield Knob(f"{prefix}{name}", default, texts.get(name, ""), literals(hints[name]))
            continue
        found: dict[str, list[tuple[Knob, type[Any]]]] = {}
        for member in members:
            for knob in _knobs(member, f"{prefix}{name}."):
                found.setdefault(knob.name, []).append((knob, member))
        for own in found.values():
            yield _joined(own, members)


def _joined(own: list[tuple[Knob, type[Any]]], members: list[type[Any]]) -> Knob:
    """One knob of several members of a union."""
    first = own[0][0]
    text = next((knob.text for knob, _ in own if knob.text), "")
    if len(own) < len(members):
        *others, last = (str(member.name) for _, member in own)
        text = f"{text} Applies to {' and '.join(filter(None, (', '.join(others), last)))}."
    allowed = tuple(dict.fromkeys(choice for knob, _ in own for choice in knob.choices))
    return Knob(first.name, first.default, text, allowed)


def _choices(kind: type[Any], prefix: str) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(kind, include_extras=True)
    for name, _ in _fields(kind):
        for member in sections_in(hints[name]):
            if prefix:
                yield f"{prefix}{name}", first_field(member)
            yield from _choices(member, f"{prefix}{name}.")


def _fields(kind: type[Any]) -> list[tuple[str, Any]]:
    """Names and defaults."""
    if is_dataclass(kind):
        return [(each.name, _default(each)) for each in fields(kind)]
    infos = kind.model_fields.items()
    return [(name, MISSING if info.is_required() else info.default) for name, info in infos]


def _default(each: Field[Any]) -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default


def sections_in(hint: Any) -> list[type[Any]]:
    """The sections that a field may hold: one, several of a union, or none; those in lists are values."""
    if get_origin(hint) is Annotated:
        return sections_in(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [section for part in get_args(hint) for section in sections_in(part)]
    return [hint] if is_dataclass(hint) and isinstance(hint, type) else []


def literals(hint: Any) -> tuple[Any, ...]:
    """The values of the literals in a type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(value for part in get_args(hint) for value in literals(part))


def docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the docstring below each field of a class and of its base classes."""
    found: dict[str, str] = {}
    for base in reversed([each for each in kind.__mro__ if is_dataclass(each) or each is kind]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found
