"""Notation: rewrite the many notations of data sets and models into one.

    √2, \\sqrt2, sqrt(2)              \\sqrt{2}          x², x^{2}, x**2         x^2
    ½, \\dfrac12, \\tfrac{1}{2}        \\frac{1}{2}       −1, –1                 -1
    145°, 145^{\\circ}, 145 degrees   145°              50\\%, 50 percent       50%
    1\\,500, 7{,}000, 7,\\!000         1500, 7000        \\left( x \\right)       ( x )
    \\text{Paris}, **Paris**, $Paris$  Paris             ≤, \\leqslant, <=       \\le

Nothing here interprets meaning: `plain` returns text that a human would read the same way. All patterns run on text of
at most `MAX_CHARACTERS`. Longer text is not a mathematical answer and is compared by `squeezed` only.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CHARACTERS = 1024
"""The most characters of a text that is rewritten."""

DOLLAR = "\ue000"
"""The currency sign, as opposed to the sign that delimits mathematics."""
CURRENCIES = DOLLAR + "€£¥₹"

_SIGNS = {
    **dict.fromkeys("−–‒‐‑－﹣", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2007\u3000", " "),
    **dict.fromkeys("\u2006\u2008\u2009\u200a\u202f", "\\,"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict.fromkeys("×✕✖⨯", "\\times "),
    **dict.fromkeys("·⋅∙•", "\\cdot "),
    **dict.fromkeys("÷∕⁄／", "/"),
    **dict.fromkeys("º˚∘", "°"),
    **dict.fromkeys("′’‘ʹ", "'"),
    **dict.fromkeys("″“”", '"'),
    **dict.fromkeys("∶：", ":"),
    "，": ",",
    "、": ",",
    "；": ";",
    "（": "(",
    "）": ")",
    "％": "%",
    "＝": "=",
    "＋": "+",
    "。": ".",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "≃": "\\approx ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "∞": "\\infty ",
    "∈": "\\in ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∅": "\\emptyset ",
    "∠": "\\angle ",
    "△": "\\triangle ",
    "∥": "\\parallel ",
    "⊥": "\\perp ",
    "→": "\\to ",
    "ℝ": "\\mathbb{R}",
    "℃": "°C",
    "℉": "°F",
    "µ": "μ",
    "²": "^{2}",
    "∛": "\\sqrt[3]",
    "⟨": "\\langle ",
    "⟩": "\\rangle ",
}
_TABLE = str.maketrans(_SIGNS)
_LETTERS = "αβγδεζηθικλνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
_LONE_GREEK = re.compile(rf"(?<![\u0370-\u03ff])[{_LETTERS}](?![\u0370-\u03ff])")
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢₓ"
_LEVEL = "0123456789+-()nix"
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
_VULGAR = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)")

_TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|it|bf|sf|tt|normal)|mbox|hbox|emph|boldsymbol|bm)"
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), written)
    for pattern, written in [
        (r"\\{2,}(?=[A-Za-z])(?!begin|end)", r"\\"),  # JSON that was escaped twice has double backslashes
        (r"\\\$", DOLLAR),
        (r"\\%", "%"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", " "),
        (r"\\(?:displaystyle|limits|nolimits|textstyle|rm|bf)(?![a-zA-Z])", " "),
        (r"\\(?:leq|leqslant|lt=|le)(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\(?:geq|geqslant|gt=|ge)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:approx|simeq|thickapprox)(?![a-zA-Z])|~=", r"\\approx "),
        (r"\\(?:dots|ldots|cdots)(?![a-zA-Z])|…", "..."),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"\\(?:varnothing|empty)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:setminus|backslash)(?![a-zA-Z])", r"\\setminus "),
        (r"(?<![\\A-Za-z])(?:infinity|oo)(?![A-Za-z])|\\?\+\s*\\infty(?![a-zA-Z])", r"\\infty "),
        (r"\\!\s*", ""),
        (r"\{\s*,\s*\}", r"\\,"),
        (r"\s*(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|\\textdegree)(?![a-zA-Z])", "°"),
        (r"(?<=[\d}])\s*(?:degrees?|deg)(?![a-zA-Z])", "°"),
        (r"(?<=[\d.)}])\s*°", "°"),
        (r"°\s*(?:Celsius|C(?![a-zA-Z]))", " °C"),
        (r"°\s*(?:Fahrenheit|F(?![a-zA-Z]))", " °F"),
        (r"(?<=[\d}])\s*(?:percent(?:age)?|pct|per cent)(?![a-zA-Z])", "%"),
        (r"(?<=[\d}])\s+%", "%"),
        (r"(?<=[\d}])\s*(?:US )?[dD]ollars?(?![a-zA-Z])|(?<=[\d}])\s*USD(?![a-zA-Z])", DOLLAR),
        (r"(?<![a-zA-Z])(?:USD|US(?=\$|\ue000))\s*(?:\$|\ue000)?(?=\s*\d)", DOLLAR),
        (r"(?<=[\d}])\s*(?:[eE]uros?|EUR)(?![a-zA-Z])|(?<![a-zA-Z])EUR\s*(?=\d)", "€"),
        (r"\^\s*\{?\s*\\prime\s*\}?|\\prime(?![a-zA-Z])", "'"),
        (r"\*\*(?=\s*[\d({a-zA-Z-])", "^"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
    ]
]
_BOLD = re.compile(r"(?<![\w*)])\*\*(?![\s*])([^*]+)\*\*|__([^_]+)__")
_TEXT_GROUP = re.compile(_TEXT + r"\s*\{([^{}]*)\}")
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3})((?:\\[,:; ]\s*\d{3})+)(?!\d)")
_GROUPED_MIXED = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\\?[,:; ]?\d{3}|\\[,:; ]\d{3})+)(?!\d)")
_FRACTION = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|(\{[^{}]*\})\s*(\d)|(\d)\s*(?=\{))")
_BARE_ROOT = re.compile(r"\\sqrt(\s*\[\d+\])?\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+)")
_ROOT_WORD = re.compile(r"√|(?<![\\A-Za-z])sqrt")
_LEVELS = re.compile(r"\s*([\^_])\s*(?:\{\s*([^{}\\\s])\s*\}|([^\s{\\]))")
_SPACES = re.compile(r"(?<!\\)\\(?:[,;: ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z]))|~")
_WHOLE = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]|`([^`]+)`|\"([^\"]+)\"", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")


def squeezed(text: str) -> str:
    """Replace all white space by single blanks, in linear time, on text of any length."""
    return " ".join(text.split())


def folded(text: str) -> str:
    """Return words in the form that is compared: case and the encoding of accents do not count."""
    return unicodedata.normalize("NFC", squeezed(text)).casefold()


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """Rewrite `text` into the one notation. Text that is too long is only squeezed."""
    text = squeezed(text)
    if len(text) > MAX_CHARACTERS:
        return text
    while (inner := _unwrapped(text)) != text:
        text = inner
    text = _OTHER_DIGIT.sub(lambda m: str(unicodedata.decimal(m[0])), unicodedata.normalize("NFC", text))
    text = _signs(text)
    text = _dollars(text)
    for _ in range(4):  # from the inside out
        text = _TEXT_GROUP.sub(r" \1 ", text)
    for pattern, written in _REWRITES:
        text = pattern.sub(written, text)
    text = _GROUPED.sub(_joined, text)
    text = _SPACES.sub(" ", _GROUPED_MIXED.sub(_joined, text) if "\\" in text else text)
    text = _roots(text)
    text = _FRACTION.sub(_fraction, text)
    text = _BARE_ROOT.sub(lambda m: f"\\sqrt{(m[1] or '').strip()}{{{m[2]}}}", text)
    text = _LEVELS.sub(lambda m: f"{m[1]}{m[2] or m[3]}", text)
    text = _undotted(squeezed(text))
    return text if (inner := _unwrapped(text)) == text else plain(inner)


def _unwrapped(text: str) -> str:
    """Remove one layer around an answer: delimiters, a box, bold signs, a final full stop."""
    text = _undotted(text.strip())
    if match := _WHOLE.fullmatch(text):
        inner = next(group for group in match.groups() if group is not None).strip()
        return inner if inner and "\\)" not in inner and "\\]" not in inner else text
    if len(text) > 4 and (match := _BOLD.fullmatch(text)):
        return (match[1] or match[2]).strip()
    for box in (_BOX, _WRAPPED_TEXT):
        if match := box.match(text):
            end = closing(text, match.end())
            if end == len(text) - 1:
                return text[match.end() + 1 : end].strip()
    return text


_WRAPPED_TEXT = re.compile(_TEXT + r"\s*(?=\{)")


def _undotted(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def closing(text: str, opening: int, limit: int | None = None) -> int:
    """Return the index of the brace that closes the one at `opening`; -1 if there is none (within `limit`
    characters)."""
    depth, escaped = 0, False
    for i in range(opening, len(text) if limit is None else min(len(text), opening + limit)):
        if escaped:
            escaped = False
        elif text[i] == "\\":
            escaped = True
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return -1


def _signs(text: str) -> str:
    text = _SCRIPTS.sub(_level, text)
    text = _VULGAR.sub(_vulgar, text)
    text = text.translate(_TABLE)
    return _LONE_GREEK.sub(_greek, text)


def _greek(match: re.Match[str]) -> str:
    """Write `π` as `\\pi` and `Δ` as `\\Delta`."""
    name = unicodedata.name(match[0]).split()[-1].replace("LAMDA", "LAMBDA").lower()
    return f"\\{name.capitalize() if match[0].isupper() else name} "


def _level(match: re.Match[str]) -> str:
    raised = match[1] is not None
    inner = match[0].translate(str.maketrans(_RAISED if raised else _LOWERED, _LEVEL))
    return f"{'^' if raised else '_'}{{{inner}}}"


def _vulgar(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _dollars(text: str) -> str:
    """Remove dollar signs that delimit mathematics. A single one before a number is the currency."""
    if (text.replace("\\$", "").count("$")) % 2:
        return re.sub(r"(?<!\\)\$(?=\s*-?[\d.])|(?<=\d)\s?(?<!\\)\$", DOLLAR, text, count=1)
    return re.sub(r"(?<!\\)\$", " ", text) if "$" in text else text


def _joined(match: re.Match[str]) -> str:
    """Join the digits of a number that thin spaces group. Commas are left to the reader of numbers."""
    if "\\" not in match[2]:
        return match[0]
    return match[1] + re.sub(r"\D", "", match[2])


def _fraction(match: re.Match[str]) -> str:
    if match[1]:
        return f"\\frac{{{match[1]}}}{{{match[2]}}}"
    if match[3]:
        return f"\\frac{match[3]}{{{match[4]}}}"
    return f"\\frac{{{match[5]}}}"


def _roots(text: str) -> str:
    """Write `√(x+1)` and `sqrt(x+1)` with braces."""
    text = _ROOT_WORD.sub(r"\\sqrt", text)
    start = text.find("\\sqrt(")
    while start >= 0:
        depth, end = 0, -1
        for i in range(start + 5, len(text)):
            depth += (text[i] == "(") - (text[i] == ")")
            if depth == 0:
                end = i
                break
        if end < 0:
            return text
        text = f"{text[: start + 5]}{{{text[start + 6 : end]}}}{text[end + 1 :]}"
        start = text.find("\\sqrt(", start + 5)
    return text
