"""Reading: the classifier `read` turns every text into one tagged value (rewards/answers/kinds.py).

It tries, in this order: time, number, letter, date or range (which are words), list, relation, ratio, quantity,
expression, words. A list or a relation is split outside of all brackets, and its parts are read in the same way.
"""

from __future__ import annotations

import re
from functools import lru_cache

from rewards.answers.kinds import Expression, Kind, Letter, Named, Quantity, Ratio, Relation, Several, Time, Words
from rewards.answers.mathematics import MAX_CHARACTERS, is_mathematics, value_of
from rewards.answers.notation import folded, plain
from rewards.answers.numbers import Number, read_number, split_sign

_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*\)?|([A-Z])\s*[.)]")
_TIME = re.compile(
    r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:([aApP])\.?\s*[mM]\.?)?|([0-9]{1,2})\s*([aApP])\.?[mM]\.?"
)
_DATE_OR_RANGE = re.compile(
    r"[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}|[0-9](?:[0-9.,]*[0-9])?\s*-\s*[0-9](?:[0-9.,]*[0-9])?(?:\s*-\s*[0-9]+)*|0[0-9]+-[0-9]+"
)
_NUMBER_FIRST = re.compile(r"[+-]?\s*(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?")
_UNIT = re.compile(
    r"(?:°[CF]|[A-Za-zμΩ]{2,})(?:\^(?:\{-?[0-9]\}|[0-9]))?"
    r"(?:(?:[\s/*.-]|\\cdot|\\times)+[A-Za-zμΩ]+(?:\^(?:\{-?[0-9]\}|[0-9]))?)*$"
)
_SHORT_UNIT = re.compile(
    r"[cmdkμn]m|[km]g|[mcd][lL]|ft|in|yd|mi|oz|lb|hr|k[JWNV]|m[VA]|Hz|Pa|eV|cc|[pq]t|[KMGT]B|°[CF]|[ap]m"
)
"""Matches units of two letters. Any other two letters are symbols that are multiplied."""
_ANY_UNIT = re.compile(r"(?:sq(?:uare|\.)?|cubic|cu\.?)?\s*units?(?:\s*\^(?:\{[23]\}|[23])|\s+(?:squared|cubed))?")
"""Matches generic units: `27 units` means 27."""
_NAME = re.compile(
    r"(?:m?\s*\\angle\s*)?(?:\\[A-Za-z]+|[A-Za-z]{1,3}|\|\s*[A-Z]{2}\s*\||\\overline\{[A-Z]{2}\}|\\(?:vec|mathbf|overrightarrow)\{[A-Za-z]+\})"
    r"(?:_(?:[A-Za-z0-9]+|\{[^{}]*\}))?'*(?:\s*\(\s*[A-Za-z0-9, ]{1,9}\s*\))?(?:\^(?:-1|\{-1\}))?"
)
_NAMED_TUPLE = re.compile(r"\(\s*[A-Za-z](?:_[a-z0-9])?(?:\s*,\s*[A-Za-z](?:_[a-z0-9])?)+\s*\)")
_OPERATOR = re.compile(r"\\(?:le|ge|ne|approx|in)(?![a-zA-Z])|[=<>]")
_SEPARATOR = re.compile(r"[,;](?:\s*(?:and|or)(?![a-zA-Z]))?|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_GROUPING = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_CLOSINGS = {"(": ")]", "[": ")]", "\\{": ("\\}",), "{": "}", "\\langle": ("\\rangle",)}


@lru_cache(maxsize=4096)
def read(text: str) -> Kind:
    """Read `text` as an answer."""
    return _read(plain(text), 0)


def _read(text: str, depth: int) -> Kind:
    if len(text) > MAX_CHARACTERS or depth > 4:
        return Words(folded(text))
    if match := _TIME.fullmatch(text):
        hour, minute, second, half, full, half_of_full = match.groups()
        return Time(int(hour or full) * 60 + int(minute or 0), int(second or 0), (half or half_of_full or "").lower())
    if (number := read_number(text)) is not None:
        return number
    if match := _LETTER.fullmatch(text):
        return Letter((match[1] or match[2]).casefold())
    if _DATE_OR_RANGE.fullmatch(text):
        return Words(folded(text).replace(" ", ""))
    return (
        _several(text, depth) or _relation(text, depth) or _ratio(text) or _quantity(text) or _expression(text)
        or Words(folded(text))
    )  # fmt: skip


def _expression(text: str) -> Number | Expression | None:
    core, sign = split_sign(text)
    core = core.strip()
    while core.startswith("(") and _matching(core, 0) == len(core) - 1:
        core = core[1:-1].strip()
    if sign and sign in "'\"" and not re.search(r"[0-9})]$", core):
        return None
    if core != text and (number := read_number(core)) is not None and not number.sign:
        return Number(number.value, number.decimal, sign)
    return Expression(core, sign) if is_mathematics(core) else None


def _ratio(text: str) -> Ratio | None:
    parts = [part.strip() for part in text.split(":")]
    if len(parts) < 2 or not all(part and (read_number(part) or _expression(part)) for part in parts):
        return None
    return Ratio(tuple(parts))


def _quantity(text: str) -> Number | Expression | Quantity | None:
    start = _NUMBER_FIRST.match(text)
    first = start.end() if start else 0
    for match in (_UNIT.match(text, first + len(text[first:]) - len(text[first:].lstrip())), _UNIT.search(text)):
        if match is None or not match.start() or text[match.start() - 1] in "\\_^" or text[match.start() - 1].isalpha():
            continue
        unit = match[0]
        head = re.match(r"°?[A-Za-zμΩ]+", unit)
        if head is None or (len(head[0]) == 2 and not _SHORT_UNIT.fullmatch(head[0])) or head[0] in ("or", "and"):
            continue
        counted = text[: match.start()].strip()
        value = read_number(counted) or _expression(counted)
        if value is not None and _ANY_UNIT.fullmatch(unit):
            return value
        if value is not None:
            return Quantity(value, re.sub(r"[{}\s]", "", unit).replace("\\cdot", "*").replace("\\times", "*"))
    return None


def _relation(text: str, depth: int) -> Kind | None:
    """Read `text` with a relation sign outside of brackets: a named value, or a relation."""
    sides, operators = _split(text, _OPERATOR)
    if not operators:
        return None
    sides = [side.strip() for side in sides]
    if "\\approx" in operators:  # an exact value counts, if there is one
        cut = operators.index("\\approx")
        if cut or not (sides[0] == "" or _NAME.fullmatch(sides[0])):
            sides, operators = sides[: cut + 1], operators[:cut]
        else:
            operators = ["=", *operators[1:]]
        if not operators:
            return _read(sides[0], depth + 1)
    if operators[0] in ("=", "\\in") and set(operators) <= {"=", "\\in"}:
        if sides[0] == "":
            return _read(sides[-1], depth + 1)
        if _NAMED_TUPLE.fullmatch(sides[0]):
            return _read(sides[-1], depth + 1)
        if _NAME.fullmatch(sides[0]) or (len(operators) == 1 and _quotient_name(sides[0])):
            name, value = re.sub(r"\s", "", sides[0]), _read(sides[-1], depth + 1)
            if not isinstance(value, Words) or not is_mathematics(sides[0] + "=" + sides[-1]):
                return Named((name,), (value,))
    if not all(operator in ("=", "<", ">", "\\le", "\\ge", "\\ne") for operator in operators):
        return None
    if set(operators) == {"="} and all(value_of(side) is not None for side in sides):  # a calculation: 3 + 4 = 7
        return _read(sides[-1], depth + 1)
    if not all(is_mathematics(side) or _NAME.fullmatch(side) for side in sides):
        return None
    if all(operator in (">", "\\ge") for operator in operators):
        turned = {">": "<", "\\ge": "\\le"}
        sides, operators = sides[::-1], [turned[operator] for operator in reversed(operators)]
    return Relation(tuple(sides), tuple(operators))


def _quotient_name(text: str) -> bool:
    """Return whether a text is a quotient of names: `\\frac{NO}{BO}`, `AB/CD`, `S_{MBCN}:S`."""
    parts = re.fullmatch(r"\\frac\{(.+)\}\{(.+)\}|([^/:]+)[/:]([^/:]+)", text)
    return parts is not None and all(_NAME.fullmatch(part.strip()) for part in parts.groups() if part)


def _several(text: str, depth: int) -> Kind | None:
    parts, unions = _split(text, _UNION)
    if unions:
        return _all(parts, "u", depth)
    if (both := _plus_minus(text, depth)) is not None:
        return both
    if (bracketed := _bracketed(text, depth)) is not None:
        return bracketed
    parts = _listed(text, grouping=True)
    if len(parts) < 2:
        return None
    read_parts = _all(parts, "", depth)
    return None if read_parts is None else _joined(read_parts)


def _joined(listed: Several) -> Kind:
    """Read a list of named values: `x = 1, y = 2` names two values, while `x = 1 or x = 2` and `n = 1, 2` list two."""
    names = [item.names[0] for item in listed.items if isinstance(item, Named)]
    if not names:
        return listed
    values = tuple(item.values[0] if isinstance(item, Named) else item for item in listed.items)
    if len(set(names)) == 1 and isinstance(listed.items[0], Named):
        return Several(values)
    if len(set(names)) == len(listed.items):
        return Named(tuple(names), values)
    return listed


def _all(parts: list[str], brackets: str, depth: int) -> Several | None:
    """Return the parts, if every one of them is mathematics."""
    items = tuple(_read(part.strip(), depth + 1) for part in parts)
    if any(isinstance(item, Words) for item in items) or not all(part.strip() for part in parts):
        return None
    if all(isinstance(item, Letter) for item in items) and not brackets:
        return None
    return Several(items, brackets)


def _plus_minus(text: str, depth: int) -> Several | None:
    signs = re.findall(r"\\pm(?![a-zA-Z])", text)
    if len(signs) != 1 or len(_listed(text, grouping=True)) > 1:
        return None
    name, equals, value = text.rpartition("=")
    if equals and not _NAME.fullmatch(name.strip()):
        return None
    both = [
        re.sub(r"\\mp(?![a-zA-Z])", mp, re.sub(r"\\pm(?![a-zA-Z])", pm, value)).strip().removeprefix("+")
        for pm, mp in ("+-", "-+")
    ]
    return _all(both, "", depth)


def _bracketed(text: str, depth: int) -> Kind | None:
    opening = next((o for o in _CLOSINGS if text.startswith(o)), None)
    if opening is None:
        return None
    closing = next((c for c in _CLOSINGS[opening] if text.endswith(c)), None)
    if closing is None or _matching(text, 0) < len(text) - 1:
        return None
    if closing == "}" and text.endswith("\\}") != text.startswith("\\{"):
        return None
    parts = _listed(text[len(opening) : -len(closing)], grouping=False)
    if len(parts) < 2 and opening == "{":  # LaTeX braces that only group
        value = _read(parts[0], depth + 1)
        return None if isinstance(value, Words) else value
    if len(parts) < 2 and opening != "\\{":
        return None
    return _all(parts, (opening + closing).replace("\\", "").replace("langle", "(").replace("rangle", ")"), depth)


def _listed(text: str, grouping: bool) -> list[str]:
    """Return the parts of a list. A comma in a number groups digits if other commas, followed by a space, separate. If
    all commas are alike, they group digits only in a list without brackets."""
    if grouping or re.search(r",\s", text):
        text = _GROUPING.sub("", text)
    parts = _split(text, _SEPARATOR)[0]
    if len(parts) > 1 and ";" in text and re.search(r"[0-9],[0-9]", text) and "(" not in text:
        return text.split(";")
    flattened: list[str] = []
    for part in parts:  # `5, 7 and 9`
        flattened.extend(p for p in [part.strip()] if p or len(parts) == 1)
    return flattened


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split `text` at the separators outside of all brackets. Also return these separators."""
    level, depth = [0] * (len(text) + 1), 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        level[i + 1] = depth
    parts, found, start = [], [], 0
    for match in separator.finditer(text):
        if level[match.start()] == 0:
            parts.append(text[start : match.start()])
            found.append(match[0])
            start = match.end()
    return [*parts, text[start:]], found


def _matching(text: str, opening: int) -> int:
    """Return the index of the bracket, of whatever form, that closes the one at `opening` (or the sign before it)."""
    depth = 0
    if text.startswith("\\langle"):
        return text.rfind("\\rangle") + 6 if text.count("\\langle") == 1 else -1
    for i in range(opening, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 and text[i] in ")]}":
            return i
    return -1
