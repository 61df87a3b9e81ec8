"""Numbers: read them exactly, with their signs, and compare them by the digits that are written.

    3, -1,000.5, 1 000, 2e3, 1/3, \\frac{1}{3}, 2\\frac{1}{2}, 0.\\overline{3}, 6.63 \\times 10^{-34}
    50%, 145°, 37°30', $5, 5 million

A decimal equals a number that rounds to the same six digits after the point, and, below 1, to the same six significant
digits: 0.333333 is 1/3, 0.0000012 is not 0.0000013. Whole numbers and fractions are compared exactly. Signs count: 50%
is 0.5. An angle may be written without its sign, and an amount without its currency. 30' (feet, minutes) is not 30, and
numbers with different signs differ.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.answers.notation import CURRENCIES

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_PLAIN = re.compile(rf"{_DECIMAL}(?:[eE][+-]?[0-9]{{1,3}})?")
_QUOTIENT = re.compile(rf"(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})")
_FRACTION = re.compile(r"(?P<whole>[0-9]+)?\s*\\frac\{\s*(?P<top>-?[0-9.,]+)\s*\}\{\s*(?P<bottom>-?[0-9.,]+)\s*\}")
_MIXED = re.compile(r"(?P<whole>[0-9]+)\s+(?P<top>[0-9]+)/(?P<bottom>[0-9]+)")
_SCIENTIFIC = re.compile(
    rf"(?:(?P<factor>{_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*(?:\{{\s*([+-]?[0-9]{{1,3}})\s*\}}|([+-]?[0-9]{{1,3}}))"
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar)\{\s*([0-9]+)\s*\}|\\dot\{?([0-9])\}?)")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(?P<factor>{_DECIMAL})\s*(?P<scale>(?i:{'|'.join(_SCALES)}))")
_SIGNED = re.compile(r"([+-]?)\s*(.+)", re.DOTALL)
_ANGLE = re.compile(r"([+-]?[0-9]+)°\s*([0-9]+(?:\.[0-9]+)?)'(?:\s*([0-9]+(?:\.[0-9]+)?)(?:\"|''))?")
_LEADING = re.compile(rf"([+-]?)\s*([{CURRENCIES}])\s*")
_TRAILING = re.compile(rf"\s*(''|[%°'\"{CURRENCIES}])$")


@dataclass(frozen=True, slots=True)
class Number:
    """A number that a text states by itself."""

    value: Fraction
    decimal: bool
    """Whether it is written with a point, so that it may stand for a value with more digits."""
    sign: str = ""
    """Its sign: `%`, `°`, `'`, `"`, or a currency."""


def split_sign(text: str) -> tuple[str, str]:
    """Split an expression from its sign: `\\frac{1}{2}%` becomes (`\\frac{1}{2}`, `%`)."""
    if match := _TRAILING.search(text):
        return text[: match.start()], '"' if match[1] == "''" else match[1]
    if match := _LEADING.match(text):
        return match[1] + text[match.end() :], match[2]
    return text, ""


def read_number(text: str) -> Number | None:
    """Read plain `text` that is one number from end to end; None for anything else."""
    if match := _ANGLE.fullmatch(text):
        degrees = Fraction(match[1])
        rest = Fraction(match[2]) / 60 + Fraction(match[3] or 0) / 3600
        return Number(degrees - rest if match[1].startswith("-") else degrees + rest, False, "°")
    core, sign = split_sign(text)
    match = _SIGNED.fullmatch(core.strip())
    if match is None:
        return None
    found = _unsigned(match[2])
    if found is None:
        return None
    value, decimal = found
    return Number(-value if match[1] == "-" else value, decimal, sign)


def _unsigned(text: str) -> tuple[Fraction, bool] | None:
    decimal = "." in text
    if _PLAIN.fullmatch(text):
        return _fraction(text), decimal
    for pattern in (_QUOTIENT, _FRACTION, _MIXED):
        if match := pattern.fullmatch(text):
            parts = match.groupdict()
            try:
                quotient = _fraction(parts["top"]) / _fraction(parts["bottom"])
            except (ValueError, ZeroDivisionError):
                return None
            return quotient + int(parts.get("whole") or 0), decimal
    if match := _SCALED.fullmatch(text):
        return _fraction(match["factor"]) * 10 ** _SCALES[match["scale"].lower()], decimal
    if match := _REPEATING.fullmatch(text):
        whole, first, again = match[1] or "0", match[2], match[3] or match[4]
        repeated = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(first))
        return Fraction(f"{whole}.{first}0") + repeated, False
    if match := _SCIENTIFIC.fullmatch(text):
        power = int(match[2] or match[3])
        return _fraction(match["factor"] or "1") * Fraction(10) ** power, decimal
    return None


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def scales(gold: str, answer: str) -> tuple[Fraction, Fraction] | None:
    """Return the factors by which to multiply two values with these signs before they are compared; None if the signs
    do not match."""
    if gold == answer:
        return Fraction(1), Fraction(1)
    if {gold, answer} == {"%", ""}:
        return Fraction(1, 100 if gold else 1), Fraction(1, 100 if answer else 1)
    if not (gold and answer) and (gold or answer) in "°" + CURRENCIES:
        return Fraction(1), Fraction(1)
    return None


def numbers_equal(gold: Number, answer: Number, tolerance: float = 0.0) -> bool:
    """Return whether two numbers are equal or, with `tolerance` (a share of the gold number), close enough."""
    by = scales(gold.sign, answer.sign)
    if by is None:
        return False
    target, value = gold.value * by[0], answer.value * by[1]
    if tolerance and abs(value - target) <= Fraction(tolerance) * abs(target) * (1 + Fraction(1, 10**9)):
        return True
    return values_equal(target, value, gold.decimal or answer.decimal)


def values_equal(target: Fraction, value: Fraction, decimal: bool) -> bool:
    """Return whether two values are equal. If one is written as a decimal, six digits after the point and six
    significant digits must agree."""
    if target == value or not decimal or not target:
        return target == value
    exponent = math.floor(math.log10(abs(target.numerator)) - math.log10(target.denominator))
    return abs(target - value) <= Fraction(5, 10**7) * min(Fraction(1), Fraction(10) ** (exponent + 1))
