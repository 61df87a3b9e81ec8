"""Equality: one comparison for each kind of gold answer (rewards/answers/kinds.py).

Number      the same number, sign included; an expression with that value
Expression  the same value, at every point
Quantity    the same value and the same unit, as text
Several     the same brackets, and equal values in order; without brackets, in sets and in unions in any order
Named       the same names with equal values, in any order; or the values alone, in the gold's order
Relation    the same relation, up to a factor and the side it is written on; for one unknown, the interval it states
Time        the same time; am and pm count where both are given, and 20:15 is 8:15 pm
Ratio       the same ratio; of two parts, also their quotient
Letter      the same letter, with or without brackets
Words       the same words
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.answers.kinds import Expression, Kind, Letter, Named, Quantity, Ratio, Relation, Several, Time, Words
from rewards.answers.mathematics import expressions_equal, proportional, value_of
from rewards.answers.numbers import Number, numbers_equal, read_number, scales
from rewards.answers.reading import read

_UNKNOWN = re.compile(r"[A-Za-z](?:_[A-Za-z0-9])?(?:\([a-z]\))?|\\(?:theta|alpha|beta|lambda|mu|phi)")
_SUM_OF_NAMES = re.compile(
    r"[A-Za-z](?:_[A-Za-z0-9])?(?:\s*[+-]\s*[A-Za-z](?:_[A-Za-z0-9])?)+|\\(?:sin|cos|tan|cot|sec|csc|log|ln)(?![a-z])[^=<>]+"
)
"""Matches the left side of a worked-out result: `m + n = 204`, `\\sin 60° = ..`."""
MAX_ITEMS = 32
"""Longest list whose order does not count, since every pair of items may have to be compared."""


def same(gold: Kind, answer: Kind, tolerance: float = 0.0) -> bool:
    """Return whether `answer` equals the gold answer. `tolerance` applies to single numbers only."""
    if isinstance(answer, Named) and not isinstance(gold, Named | Relation):
        answer = answer.values[0] if len(answer.values) == 1 else Several(answer.values)
    match gold, answer:
        case (Words(text), Words()) if not text:  # nothing is left of it
            return False
        case (Words(), Words()) | (Letter(), Letter()):
            return gold == answer
        case Time(), Time():
            return _times(gold, answer)
        case Ratio(), _:
            return _ratios(gold, answer)
        case Quantity(), Quantity():
            return _unit(gold.unit) == _unit(answer.unit) and same(gold.value, answer.value, tolerance)
        case Named(), _:
            return _named(gold, answer, tolerance)
        case Relation(), Named():
            return len(answer.values) == 1 and _relation_to_named(gold, answer)
        case Several(), Relation():
            interval = interval_of(answer)
            return interval is not None and _lists(gold, interval)
        case Relation(), Several():
            interval = interval_of(gold)
            return interval is not None and _lists(interval, answer)
        case Several(), Several():
            return _lists(gold, answer)
        case Relation(), Relation():
            return _relations(gold, answer)
        case ((Number() | Expression()), (Number() | Expression())):
            return _values(gold, answer, tolerance)
        case ((Number() | Expression() | Quantity()), Relation(sides, ("=",))) if _SUM_OF_NAMES.fullmatch(sides[0]):
            return same(gold, read(sides[1]), tolerance)
        case ((Number() | Expression()), Ratio()):
            return len(answer.parts) == 2 and same(gold, _quotient(answer), tolerance)
        case Expression(), Letter():
            return gold.text.casefold() == answer.letter
        case Letter(), Expression():
            return gold.letter == answer.text.casefold()
    return False


def _times(gold: Time, answer: Time) -> bool:
    """Return whether two times are equal on the clock that both use: 8:15 pm is 20:15 and 8:15, but not 8:15 am."""
    if gold.seconds != answer.seconds or (gold.half and answer.half and gold.half != answer.half):
        return False
    return gold.minutes == answer.minutes or _of_the_day(gold) == _of_the_day(answer)


def _of_the_day(time: Time) -> int:
    return time.minutes % 720 + 720 * (time.half == "p") if time.half else time.minutes


def _unit(unit: str) -> str:
    return unit.rstrip(".").replace(" ", "").replace("per", "/") if len(unit) < 4 else unit.rstrip(".").casefold()


def _values(gold: Number | Expression, answer: Number | Expression, tolerance: float) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        return numbers_equal(gold, answer, tolerance)
    by = scales(gold.sign, answer.sign)
    if by is None:
        return False
    if tolerance and (target := _value(gold)) is not None and (value := _value(answer)) is not None:
        target, value = target * by[0], value * by[1]
        if abs(value - target) <= Fraction(tolerance) * abs(target) * (1 + Fraction(1, 10**9)):
            return True
    left, right = (
        (_written(side) if scale == 1 else f"\\frac{{{_written(side)}}}{{{scale.denominator}}}")
        for side, scale in zip((gold, answer), by, strict=True)
    )
    return expressions_equal(left, right)


def _value(side: Number | Expression) -> Fraction | None:
    return side.value if isinstance(side, Number) else value_of(side.text)


def _written(side: Number | Expression) -> str:
    if isinstance(side, Expression):
        return side.text
    value = side.value
    if not side.decimal:
        return f"{value.numerator}" if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    exact = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    return f"{exact} + 0.0"  # with a point, it may stand for a value with more digits


def _ratios(gold: Ratio, answer: Kind) -> bool:
    if isinstance(answer, Number | Expression):
        return len(gold.parts) == 2 and same(_quotient(gold), answer)
    if isinstance(answer, Time) and answer.half == "" and not answer.seconds:
        answer = Ratio((str(answer.minutes // 60), str(answer.minutes % 60)))
    if not isinstance(answer, Ratio) or len(gold.parts) != len(answer.parts):
        return False
    pairs = zip(gold.parts, answer.parts, strict=True)
    first_gold, first_answer = gold.parts[0], answer.parts[0]
    return all(
        a == b or expressions_equal(f"({a}) \\cdot ({first_answer})", f"({b}) \\cdot ({first_gold})") for a, b in pairs
    )


def _quotient(ratio: Ratio) -> Kind:
    top, bottom = ratio.parts
    simple = f"{top}/{bottom}"
    return read_number(simple) or Expression(f"\\frac{{{top}}}{{{bottom}}}")


def _named(gold: Named, answer: Kind, tolerance: float) -> bool:
    if isinstance(answer, Named):
        if len(gold.names) == 1 and len(answer.names) == 1 and gold.names != answer.names:
            return False
        if set(gold.names) == set(answer.names):
            said = dict(zip(answer.names, answer.values, strict=True))
            return all(same(v, said[n], tolerance) for n, v in zip(gold.names, gold.values, strict=True))
        return False
    if len(gold.values) == 1:
        if isinstance(answer, Relation) and answer.operators == ("=",):
            ours = _written_side(gold.values[0])
            return ours is not None and _relations(Relation((gold.names[0], ours), ("=",)), answer)
        return same(gold.values[0], answer, tolerance)
    if not isinstance(answer, Several) or len(answer.items) != len(gold.values) or answer.brackets not in ("", "()"):
        return False
    return all(same(g, a) for g, a in zip(gold.values, answer.items, strict=True))


def _written_side(value: Kind) -> str | None:
    return _written(value) if isinstance(value, Number | Expression) else None


def _relation_to_named(gold: Relation, answer: Named) -> bool:
    """Compare a relation with named values such as `y = 2x + 1` or `x \\in [0, 1)`."""
    if isinstance(answer.values[0], Several):
        return same(gold, answer.values[0])
    value = _written_side(answer.values[0])
    return value is not None and _relations(gold, Relation((answer.names[0], value), ("=",)))


def _lists(gold: Several, answer: Several) -> bool:
    if gold.brackets == "()" and answer.brackets == "()" and gold == answer:
        return True
    in_order = len(gold.items) == len(answer.items) and all(
        same(g, a) for g, a in zip(gold.items, answer.items, strict=True)
    )
    brackets = {gold.brackets, answer.brackets}
    if in_order and (len(brackets) == 1 or ("" in brackets and "u" not in brackets)):
        return True
    return brackets <= {"", "{}", "u"} and _same_items(gold.items, answer.items)


def _same_items(gold: tuple[Kind, ...], answer: tuple[Kind, ...]) -> bool:
    """Return whether every item has a partner on the other side. Equality is transitive, so a greedy search finds the
    partners."""
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return False
    rest = list(answer)
    for item in gold:
        partner = next((i for i, other in enumerate(rest) if same(item, other)), None)
        if partner is None:
            return False
        del rest[partner]
    return True


def _relations(gold: Relation, answer: Relation) -> bool:
    if gold.operators == answer.operators and all(
        a == b or same(read(a), read(b)) for a, b in zip(gold.sides, answer.sides, strict=True)
    ):
        return True
    ours, theirs = interval_of(gold), interval_of(answer)
    if ours is not None and theirs is not None:
        unknowns = {side for relation in (gold, answer) for side in relation.sides if _UNKNOWN.fullmatch(side)}
        return len(unknowns) == 1 and _lists(ours, theirs)
    if gold.operators != answer.operators or len(gold.sides) != 2:
        return False
    factor = proportional((gold.sides[0], gold.sides[1]), (answer.sides[0], answer.sides[1]))
    return factor is not None and (factor > 0 or gold.operators[0] in ("=", "\\ne"))


def interval_of(relation: Relation) -> Several | None:
    """Return the interval of the single unknown of an inequality: `0 \\le x < 1` is `[0, 1)`."""
    sides, operators = relation.sides, relation.operators
    places = [i for i, side in enumerate(sides) if _UNKNOWN.fullmatch(side)]
    if len(places) != 1 or not set(operators) <= {"<", "\\le"} or len(sides) > 3:
        return None
    place = places[0]
    if len(sides) == 3 and place != 1:
        return None
    low = (sides[place - 1], "[" if operators[place - 1] == "\\le" else "(") if place else ("-\\infty", "(")
    high = (
        (sides[place + 1], "]" if operators[place] == "\\le" else ")") if place < len(operators) else ("\\infty", ")")
    )
    items = (read(low[0]), read(high[0]))
    return Several(items, low[1] + high[1])
