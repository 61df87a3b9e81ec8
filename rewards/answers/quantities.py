"""Quantities: compare `30 mm` with `3 cm`. pint knows the units and converts them.

    a number       as in numbers.py, or an expression without symbols: 3, 1/2, 6.63 \\times 10^{-34}, 2\\sqrt{3}
    and a unit     cm, m/s, m s^{-1}, N m, kg m/s^2, km/h, °C, Ω, centimetres, square feet, meters per second
    or several     5 ft 3 in, 1 h 30 min, 2 m and 5 cm: their sum

Two quantities are equal if their numbers are equal in the gold's unit. Quantities of different dimensions differ.
Answers with a unit that pint does not know (3 apples) are compared as text. A percent sign, or a degree sign by itself,
belongs to the number, unless the other side is in radians.

Failure modes: the case of unit names counts (`mW` is not `MW`), except in `kg` and `km`. `m` is metres and `min` is
minutes, whatever the row means by them.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, Literal

from rewards.answers.mathematics import MAX_CHARACTERS, value_of
from rewards.answers.numbers import read_number, values_equal

Units = Literal["exact", "convert", "optional"]

_WORD = r"(?:°[CF]?|[A-Za-zμ]+)(?:\^(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
_SEPARATOR = r"(?:\s*(?:\\cdot|[*/.-])\s*|\s+)"
_QUANTITY = re.compile(rf"(?P<number>.*?[0-9)}}.])\s*(?P<unit>{_WORD}(?:{_SEPARATOR}{_WORD})*)?", re.DOTALL)
"""Matches a number, perhaps with a unit. No exponent has two digits, since pint would compute m**99999999."""
_PARTS = re.compile(r"[0-9]+(?:\.[0-9]+)?\s*[A-Za-z]+(?:(?:\s*,\s*|\s+and\s+|\s*)[0-9]+(?:\.[0-9]+)?\s*[A-Za-z]+){1,2}")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")
_WRITTEN = [
    (re.compile(pattern), meant)
    for pattern, meant in [
        (r"\\cdot", "*"),
        (r"[{}]", ""),
        (r"\b[Kk][Gg]\b", "kg"),
        (r"\b[Kk][Mm]\b", "km"),
        (r"\b[Cc][Mm]\b", "cm"),
        (r"(?i:\b(?:kmh|kmph|kph)\b)", "km/h"),
        (r"\b(?:[Ss]quare|[Ss]q\.?)\s+([A-Za-z]+)", r"\1^2"),
        (r"\b(?:[Cc]ubic|[Cc]u\.?)\s+([A-Za-z]+)", r"\1^3"),
        (r"\b([A-Za-z]+)\s+squared\b", r"\1^2"),
        (r"\b([A-Za-z]+)\s+cubed\b", r"\1^3"),
        (r"\s+per\s+", "/"),
        (r"°C", "degC"),
        (r"°F", "degF"),
        (r"°", "degree"),
        (r"(?<=[A-Za-z0-9])[.-](?=\s*[A-Za-z])", "*"),
        (r"\.$", ""),
    ]
]
_ROUNDING = 1e-9
"""Relative error that a conversion may cause."""
_LONGEST = 40
"""The most characters of a unit."""


def quantities_equal(gold: str, answer: str, tolerance: float = 0.0, *, optional: bool = False) -> bool | None:
    """Return whether two quantities in plain notation are equal, up to a relative `tolerance`. None if `gold` is not a
    number with a known unit. With `optional`, an answer without a unit has the gold's unit."""
    target, given = _quantity(gold), _quantity(answer)
    if target is None or not target[1] or not is_unit(target[1]):
        return None
    if given is None:
        return False
    value, decimal, unit = given[0], "." in gold + answer, given[1]
    if target[1] == "degree" and not unit:
        return None
    if not unit and not optional:
        return False
    registry = _registry()
    try:
        wanted = registry.Quantity(float(target[0]), registry.Unit(target[1]))
        found = registry.Quantity(float(value), registry.Unit(unit) if unit else wanted.units).to(wanted.units)
        pair = (wanted.magnitude, found.magnitude)
        if "[temperature]" in wanted.dimensionality and not tolerance:  # a share of 0 °C means nothing
            pair = (wanted.to_base_units().magnitude, found.to_base_units().magnitude)
    except Exception:  # pint raises many kinds of exception for an unknown unit or another dimension
        return False
    if abs(pair[1] - pair[0]) <= max(tolerance, _ROUNDING) * abs(pair[0]):
        return True
    return decimal and values_equal(Fraction(pair[0]), Fraction(pair[1]), True)


@lru_cache(maxsize=1024)
def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Return number and unit (perhaps none), if they are all of `text`."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = re.sub(r"\\Omega\b\s*", "ohm", re.sub(r"\\mu\b\s*", "μ", text)).strip()
    if _PARTS.fullmatch(text):
        return _sum([(Fraction(number), unit) for number, unit in _PART.findall(text)])
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number = read_number(match["number"].strip())
    value = number.value if number is not None else value_of(match["number"].strip())
    if value is None or (number is not None and number.sign):
        return None
    return value, _unit(match["unit"] or "")


def _sum(parts: list[tuple[Fraction, str]]) -> tuple[Fraction, str] | None:
    """Return `5 ft 3 in` in the first unit; None unless the units have one dimension and decrease."""
    total, first = parts[0][0], _unit(parts[0][1])
    if not is_unit(first):
        return None
    last = 1.0
    for number, unit in parts[1:]:
        if not is_unit(_unit(unit)) or (number == 0 and unit == first):
            return None
        try:
            share = float(_registry().Quantity(1.0, _unit(unit)).to(first).magnitude)
        except Exception:  # of another dimension
            return None
        if share >= last:
            return None
        total, last = total + number * Fraction(share), share
    return total, first


def _unit(unit: str) -> str:
    for pattern, meant in _WRITTEN:
        unit = pattern.sub(meant, unit)
    return unit.strip()


@lru_cache(maxsize=1024)
def is_unit(unit: str) -> bool:
    """Return whether pint knows `unit`, and it is not a thing that is counted (`dollars`)."""
    if not unit or len(unit) > _LONGEST or re.search(r"[0-9]{2}", unit):
        return False
    try:
        _registry().Unit(_unit(unit))
    except Exception:  # as above
        return False
    return True


@cache
def _registry() -> Any:
    """Return pint's units, loaded when first needed (0.3 s)."""
    from pint import UnitRegistry

    return UnitRegistry(cache_folder=None)
