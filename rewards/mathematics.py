"""Whether two expressions are equal, by math-verify, and only at a bounded cost.

math-verify *extracts* expressions from prose: to it "Paris 2024" is 2024 and "3 mm" equals "3 cm". Therefore only text
that is one expression from end to end is given to it, and units are neither dropped nor converted.
Its parser and sympy take exponential time on small input (`9^{9^{9^9}}`, forty brackets), and its own time limit is a
signal handler that C code ignores: what is clearly expensive is refused here, the rest is up to a worker that can be
killed (rewards/worker.py).
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

MAX_CHARACTERS = 256
"""Longest text that is read as one expression."""
MAX_NESTING = 8
"""Deepest brackets that are read."""
MAX_NODES = 100
"""Largest expression tree that is compared."""
MAX_DIGITS = 5000
"""Longest integer that evaluating an expression may produce, about."""
MAX_EXPANDED_POWER = 8
"""Largest power of a sum with symbols in it, which comparing expands."""

_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?")
_TEXT_COMMAND = r"(?:text|mathrm|mbox)"
_COMMAND = re.compile(rf"\\(?:begin|end)\{{\w+\}}|\\(?!{_TEXT_COMMAND})[a-zA-Z]+")
_PROSE = re.compile(rf"\\{_TEXT_COMMAND}|[^\W\d_]{{3}}")
_DATE_OR_RATIO = re.compile(r":|[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}")
_MATHEMATICAL = re.compile(r"[0-9+*/^=<>\\-]")
_INTEGRAL = re.compile(r"\\i+nt")
"""Not read: sympy would try to evaluate them."""


def is_expression(text: str) -> bool:
    """Whether `text` may be read as one expression: no prose, date, time or ratio in it, and of a bearable size."""
    if not text or len(text) > MAX_CHARACTERS or _DATE_OR_RATIO.search(text) or _INTEGRAL.search(text):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest <= MAX_NESTING and not _PROSE.search(_COMMAND.sub(" ", text))


@lru_cache(maxsize=1024)
def is_mathematics(gold: str) -> bool:
    """Whether a gold answer is mathematics rather than a word or a letter ("red", "B"), and can be parsed."""
    return bool(_MATHEMATICAL.search(gold)) and is_expression(gold) and _affordable(_parse(gold))


def numbers_equal(left: str, right: str) -> bool | None:
    """Exact comparison of two plain numbers (`-1,000.5`, `2e3`, `1/3`). None where it cannot tell: one is no plain
    number, or they differ by what may be rounding."""
    if max(len(left), len(right)) > MAX_CHARACTERS:
        return None
    a, b = _number(left), _number(right)
    if a is None or b is None:
        return None
    if a == b:
        return True
    return False if a.denominator == b.denominator == 1 else None


def expressions_equal(gold: str, answer: str) -> bool:
    """Whether `answer`, one expression, equals the expression `gold` (floats to six digits). Unreadable: False."""
    return is_expression(answer) and _equal(gold, _parse(answer))


def prose_equals(gold: str, prose: str) -> bool:
    """Whether the boxed or else the last expression in `prose` equals the expression `gold`."""
    library = _math_verify()
    configs = [_latex_config(), library.ExprExtractionConfig()]
    return _equal(gold, library.parse(prose, configs, fallback_mode="no_fallback", parsing_timeout=None))


def value_of(text: str) -> float | None:
    """The number that `text` stands for: plain (also `50%`), or an expression without symbols. None for anything else.
    math-verify rounds such expressions to six digits, which is no tolerance of one's own choice."""
    if len(text) > MAX_CHARACTERS:
        return None
    plain = text.removesuffix("%").removesuffix("\\").strip()
    if (number := _number(plain)) is not None:
        return float(number) / (100 if plain != text else 1)
    if not is_expression(text):
        return None
    parsed = [expression for expression in _parse(text) if hasattr(expression, "evalf")]
    if len(parsed) != 1 or not parsed[0].is_number or not _affordable(parsed):
        return None
    value = parsed[0].evalf(15)
    return float(value) if value.is_real and value.is_finite else None


def _equal(gold: str, parsed: list[Any]) -> bool:
    return _affordable(parsed) and bool(_math_verify().verify(_parse(gold), parsed, timeout_seconds=None))


def _number(text: str) -> Fraction | None:
    numerator, slash, denominator = text.partition("/")
    values = []
    for part in (numerator.strip(), denominator.strip()) if slash else (numerator.strip(),):
        if not _NUMBER.fullmatch(part):
            return None
        values.append(Fraction(part.replace(",", "")))
    if not slash:
        return values[0]
    return values[0] / values[1] if values[1] else None


@cache
def _math_verify() -> Any:
    """math-verify, imported when first needed: it brings sympy and an ANTLR parser along (1 s)."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs every text that is no expression
    return math_verify


@cache
def _latex_config() -> Any:
    from latex2sympy2_extended import NormalizationConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    return _math_verify().LatexExtractionConfig(normalization_config=normalization)


@lru_cache(maxsize=4096)
def _parse(expression: str) -> list[Any]:
    """Sympy objects of one expression in LaTeX; empty where it is none."""
    return _math_verify().parse(
        f"${expression}$",
        [_latex_config()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _affordable(parsed: list[Any]) -> bool:
    """Whether there is something to compare, and comparing is cheap. A completion that is not cheap would take its
    siblings along into the call's time limit."""
    from sympy import Limit, Pow, preorder_traversal
    from sympy.concrete.expr_with_limits import ExprWithLimits

    nodes = [node for expression in parsed for node in preorder_traversal(expression)]
    if not nodes or len(nodes) > MAX_NODES or any(isinstance(node, ExprWithLimits | Limit) for node in nodes):
        return False
    expanded = (n for n in nodes if isinstance(n, Pow) and n.base.is_Add and n.free_symbols and n.exp.is_Number)
    if any(abs(node.exp) > MAX_EXPANDED_POWER for node in expanded):
        return False
    return sum(_digits(expression) for expression in parsed) <= MAX_DIGITS


def _digits(expression: Any) -> float:
    """Upper bound, roughly, of the decimal digits that evaluating `expression` handles; symbols count nothing."""
    from sympy import Pow, binomial, factorial

    if getattr(expression, "is_Number", False):
        return math.log10(1 + abs(float(expression))) if expression.is_finite else 0.0
    if isinstance(expression, Pow | factorial | binomial):
        base, exponent = expression.args if isinstance(expression, Pow) else (expression.args[0],) * 2
        size = _digits(exponent)
        return max(1.0, _digits(base)) * 10**size if size < 10 else math.inf
    children = getattr(expression, "args", ())
    return float(sum(_digits(child) for child in children))
