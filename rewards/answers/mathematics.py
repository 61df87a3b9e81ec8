"""Compare two expressions: math-verify's parser reads them, and their values are compared at a bounded cost.

Only text that is one expression from end to end is parsed: no prose, date, time or unit. The parser takes exponential
time on small inputs (forty brackets), and so does sympy on some (`9^{9^{9^9}}`); its own time limit is a signal
handler, which C code ignores. Clearly expensive input is refused here. The rest runs in a worker that can be killed
(rewards/process/worker.py).

Numbers are evaluated to 30 digits. Expressions with symbols are evaluated at fixed points on both sides of 0. They are
equal if they agree at all points where both have values, since two different expressions differ at almost every point.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from rewards.answers.numbers import values_equal

MAX_CHARACTERS = 256
"""The most characters of one expression."""
MAX_NESTING = 8
"""The deepest nesting of brackets that is read."""
MAX_NODES = 100
"""The largest expression tree that is compared."""
MAX_DIGITS = 5000
"""The approximate limit of the digits of an integer that an expression may produce."""
DIGITS = 30
"""Decimal digits to which expressions are evaluated."""

_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}(?:\{[lcr|]+\})?|\\(?:mathbb|operatorname)\{\w+\}|\\[a-zA-Z]+")
_NAME = re.compile(r"\\(?:\\|([a-zA-Z]+))")
_PROSE = re.compile(r"[^\W\d_]{3}|(?<![^\W\d_])(?:or|and|to|is|of|in|at)(?![^\W\d_])")
_CODE = re.compile(r"[A-DF-Za-df-z][0-9]")
"""Matches a letter followed by a digit (H2O, A1, MP3), but not 1e5. In a product, the number comes first."""
_KNOWN = set(
    re.findall(
        r"\w+",
        """
    frac sqrt binom cdot times div ast pi infty emptyset circ degree ell prime angle triangle perp parallel setminus
    le ge ne lt gt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min gcd lcm det deg
    arg Re Im lfloor rfloor lceil rceil lvert rvert vert mid langle rangle lbrack rbrack lbrace rbrace overline bar
    hat vec overrightarrow widehat mathbb operatorname begin end alpha beta gamma delta epsilon varepsilon zeta eta
    theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta
    Lambda Xi Pi Sigma Upsilon Phi Psi Omega
    """,
    )
)
"""Commands that the parser knows. It skips all others, so that `\\phantom{3}` would be 3."""
_UNREADABLE = re.compile(r"[:;?@#\"'!]{2}|[:;?@#\"'&~]|\.\.|[0-9)]_|(?<![_^0-9.])[0-9.]+\s+\.?[0-9]|%\s*[^\s*/+)}-]")
"""Matches primes and number bases, which the parser drops, and two adjacent numbers, which it adds."""
_MATHEMATICAL = re.compile(r"[0-9+*/^=<>\\|-]")
_TABLE = re.compile(r"\\begin\{")
_SCIENTIFIC = re.compile(r"(?<=[0-9])[eE]([+-]?[0-9]{1,3})(?![0-9a-zA-Z])")
_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9,])")


def is_expression(text: str) -> bool:
    """Return whether plain `text` can be read as one expression: it is pure mathematics of a limited size."""
    if not text or len(text) > MAX_CHARACTERS or not balanced(text):
        return False
    if _UNREADABLE.search(text.replace("&", ",") if _TABLE.search(text) else text):
        return False
    without_names = _COMMAND.sub(" ", text)
    return set(_NAME.findall(text)) - {""} <= _KNOWN and not (
        _PROSE.search(without_names) or _CODE.search(without_names)
    )


def balanced(text: str) -> bool:
    """Return whether the brackets of `text` are balanced and at most MAX_NESTING deep."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
        if depth < 0:
            return False
    return depth == 0 and deepest <= MAX_NESTING


@lru_cache(maxsize=1024)
def is_mathematics(text: str) -> bool:
    """Return whether plain `text` is an expression that can be compared, rather than a word or a letter ("red",
    "B")."""
    return bool(_MATHEMATICAL.search(text)) and parsed(text) is not None


def expressions_equal(gold: str, answer: str) -> bool:
    """Return whether two expressions in plain notation are equal. False if one is unreadable."""
    left, right = parsed(gold), parsed(answer)
    if left is None or right is None:
        return False
    decimal = "." in gold or "." in answer
    return bool(_tables_equal(left, right, decimal) if _is_table(left) else _values_equal(left, right, decimal))


def proportional(gold: tuple[str, str], answer: tuple[str, str]) -> float | None:
    """Return the factor c for which (left - right) of `gold` is c times that of `answer`, or None. Two equations are
    the same if c exists, and two inequalities if it is positive."""
    sides = [parsed(text) for text in (*gold, *answer)]
    if any(side is None or _is_table(side) for side in sides):
        return None
    ours, theirs = sides[0] - sides[1], sides[2] - sides[3]
    if not (ours.free_symbols and ours.free_symbols == theirs.free_symbols):
        return None
    ratios = [a / b for a, b in _samples(ours, theirs) if abs(b) > 1e-12 and abs(a) > 1e-12]
    if len(ratios) < 3 or any(abs(r - ratios[0]) > 1e-9 * abs(r) or abs(r.imag) > 1e-12 for r in ratios):
        return None
    return float(ratios[0].real)


def value_of(text: str) -> Fraction | None:
    """Return the real value of an expression without symbols."""
    expression = parsed(text)
    if expression is None or _is_table(expression) or expression.free_symbols:
        return None
    value = _evaluated(expression, {})
    return None if value is None or value.imag else Fraction(str(value.real))


def _is_table(expression: Any) -> bool:
    return hasattr(expression, "shape")


def _tables_equal(gold: Any, answer: Any, decimal: bool) -> bool:
    if not _is_table(answer) or gold.shape != answer.shape:
        return False
    return all(_values_equal(a, b, decimal) for a, b in zip(gold, answer, strict=True))


def _values_equal(gold: Any, answer: Any, decimal: bool) -> bool:
    if _is_table(answer):
        return False
    if gold == answer:
        return True
    if gold.is_Rational and answer.is_Rational:
        return False
    compared = 0
    for a, b in _samples(gold, answer):
        if not _close(a, b, decimal):
            return False
        compared += 1
    return compared >= (3 if gold.free_symbols | answer.free_symbols else 1)


def _close(a: Any, b: Any, decimal: bool) -> bool:
    if a.imag or b.imag or not decimal:
        return bool(abs(a - b) <= (1e-20 if not decimal else 1e-6) * max(abs(a), abs(b)))
    return values_equal(Fraction(str(a.real)), Fraction(str(b.real)), True)


def _samples(left: Any, right: Any) -> list[tuple[Any, Any]]:
    """Return the values of both expressions at the points where both have one."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    found = []
    for k in range(8 if symbols else 1):
        point = {symbol: _coordinate(k, i) for i, symbol in enumerate(symbols)}
        a, b = _evaluated(left, point), _evaluated(right, point)
        if (a is None) != (b is None):
            return []
        if a is not None:
            found.append((a, b))
    return found


def _coordinate(k: int, i: int) -> Any:
    """Return coordinate i of point k. It is at most 40, negative in every other point, and not a well-known value."""
    from sympy import Float

    share = math.modf((k + 1) * 0.618033988749895 + (i + 1) * 0.7548776662466927)[0]
    value = (0.1 + 1.9 * share) * (1, 1, 3, 3, 20, 20, 8, 8)[k]
    return Float(f"{-value if (k + i) % 2 else value:.17f}", DIGITS)


def _evaluated(expression: Any, point: dict[Any, Any]) -> Any:
    """Return the value as a complex mpmath number; None if there is none."""
    from mpmath import isfinite, mpmathify, workdps

    try:
        value = expression.xreplace(point).evalf(DIGITS)
        with workdps(DIGITS):
            number = mpmathify(value._to_mpmath(int(DIGITS * 3.33)))
            return number + 0j if isfinite(number) else None
    except (TypeError, ValueError, AttributeError, ArithmeticError, NotImplementedError, RecursionError):
        return None


@lru_cache(maxsize=4096)
def parsed(text: str) -> Any:
    """Return the sympy object of one expression in plain notation; None if it is not an expression, or too expensive to
    compare."""
    if not is_expression(text):
        return None
    written = _SCIENTIFIC.sub(r" \\times 10^{\1}", _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text))
    read, config = _parser()
    try:
        expression = read(written, is_real=True, convert_degrees=False, **config)
        expression = expression.as_explicit() if hasattr(expression, "as_explicit") else expression
        if not _affordable(expression):
            return None
        return _with_real_symbols(expression.doit())
    except Exception:  # the parser raises many kinds of exception for text that is not an expression
        return None


@cache
def _parser() -> Any:
    """Return math-verify's parser. It is imported when first needed, since it also imports sympy and ANTLR (1 s)."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    return latex2sympy, {
        "normalization_config": normalization,
        "conversion_config": ConversionConfig(lowercase_symbols=False),
    }


def _with_real_symbols(expression: Any) -> Any:
    """Replace `i` by the imaginary unit, and `f(2)` and the like by symbols, so that such expressions have values."""
    from sympy import I, Symbol
    from sympy.core.function import AppliedUndef

    calls = {call: Symbol(str(call), real=True) for call in expression.atoms(AppliedUndef)}
    expression = expression.xreplace(calls)
    return expression.xreplace({Symbol("i", real=True): I})


def _affordable(expression: Any) -> bool:
    """Return whether evaluating is cheap. One expensive completion would let its siblings run into the time limit
    too."""
    from sympy import Basic, Expr, Limit, MatrixBase, nan, preorder_traversal, zoo
    from sympy.concrete.expr_with_limits import ExprWithLimits

    if not isinstance(expression, Expr | MatrixBase):
        return False
    entries = list(expression) if isinstance(expression, MatrixBase) else [expression]
    nodes = [node for entry in entries for node in preorder_traversal(entry)]
    if not nodes or len(nodes) > MAX_NODES or not all(isinstance(node, Basic) for node in nodes):
        return False
    if any(isinstance(node, ExprWithLimits | Limit) or node in (nan, zoo) for node in nodes):
        return False
    return sum(_digits(entry) for entry in entries) <= MAX_DIGITS


def _digits(expression: Any) -> float:
    """Return a rough upper bound of the decimal digits in the evaluation of `expression`. Symbols do not count."""
    from sympy import Pow, binomial, exp, factorial

    if getattr(expression, "is_Number", False):
        return math.log10(1 + abs(float(expression))) if expression.is_finite else 0.0
    if isinstance(expression, Pow | factorial | binomial | exp):
        base, exponent = expression.args if isinstance(expression, Pow) else (expression.args[0],) * 2
        size = _digits(exponent)
        if size > MAX_DIGITS:
            return math.inf
        if exponent.free_symbols:
            return max(1.0, _digits(base)) * 10**size if size < 10 else math.inf
        value = _evaluated(exponent, {})
        return math.inf if value is None else max(1.0, _digits(base)) * max(1.0, float(abs(value)))
    children = getattr(expression, "args", ())
    return float(sum(_digits(child) for child in children))
