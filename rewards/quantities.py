"""Numbers with units: whether `30 mm` is `3 cm`. Units and their conversion are pint's."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any, Literal

from rewards.mathematics import MAX_CHARACTERS

Units = Literal["exact", "convert", "optional"]

_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?)"
    r"[\s~]*(?P<unit>\\?[%°A-Za-zµμΩ][A-Za-zµμΩ0-9°%/*·^ -]*)?"
)
"""A plain number, then perhaps a unit of up to 24 characters in which no exponent has two digits."""
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}|\\[,;: ]")
_WRITTEN = {"·": "*", "μ": "µ", "\\%": "%", "°C": "degC", "°F": "degF"}
_ROUNDING = 1e-9
"""Relative difference that converting may make."""


def quantities_equal(gold: str, answer: str, tolerance: float = 0.0, *, optional: bool = False) -> bool | None:
    """Whether two quantities are the same, up to a relative `tolerance`. None where `gold` is no number with a unit
    that is known, so that this cannot tell. `optional`: an answer without a unit is in the gold's."""
    target, given = _quantity(gold), _quantity(answer)
    if target is None or not target[1]:
        return None
    if given is None:
        return False
    number, unit = given
    try:
        registry = _registry()
        wanted = registry.Quantity(target[0], registry.Unit(target[1]))
        if not unit and not optional:
            return False
        found = registry.Quantity(number, registry.Unit(unit) if unit else wanted.units).to(wanted.units)
    except Exception:  # a unit that pint does not know, or of another dimension: many kinds of exception
        return None if not _known(target[1]) else False
    return bool(abs(found.magnitude - wanted.magnitude) <= max(tolerance, _ROUNDING) * abs(wanted.magnitude))


@lru_cache(maxsize=1024)
def _quantity(text: str) -> tuple[float, str] | None:
    """Number and unit (perhaps none) of `text`, which holds nothing else."""
    match = _QUANTITY.fullmatch(_TEXT.sub(lambda m: m[1] or " ", text).strip()) if len(text) <= MAX_CHARACTERS else None
    if match is None:
        return None
    unit = (match["unit"] or "").strip()
    if len(unit) > 24 or re.search(r"[0-9]{2}", unit):  # pint would compute m**99999999
        return None
    for written, meant in _WRITTEN.items():
        unit = unit.replace(written, meant)
    return float(match["number"].replace(",", "")), unit


def is_unit(unit: str) -> bool:
    """Whether `unit` is a unit that pint knows, and no mere thing that is counted (`dollars`)."""
    for written, meant in _WRITTEN.items():
        unit = unit.replace(written, meant)
    return len(unit) <= 24 and not re.search(r"[0-9]{2}", unit) and _known(unit)


@lru_cache(maxsize=1024)
def _known(unit: str) -> bool:
    try:
        _registry().Unit(unit)
    except Exception:  # as above
        return False
    return True


@cache
def _registry() -> Any:
    """pint's units, loaded when first needed (0.3 s)."""
    from pint import UnitRegistry

    return UnitRegistry(cache_folder=None)
