"""Kinds: the types of answers. Each text is one of them (rewards/answers/reading.py decides which).

Number      3, 1/2, 1,000, 6.63 \\times 10^{-34}, 50%, 145°, $5        (rewards/answers/numbers.py)
Expression  \\sqrt{2}, x^2+1, \\begin{pmatrix}..\\end{pmatrix}           (rewards/answers/mathematics.py)
Quantity    3 cm, 9\\pi cm^2, 3 apples: a number or an expression, and what is counted
Several     1, 2; (1, 2); [0, 1); {1, 2}; 1 \\pm \\sqrt{2}; a union of intervals
Named       x = 3; x = 3, y = 4; f(x) = x^2
Relation    x + y = 1, x < 5, 0 \\le x < 1
Time        12:30, 3:05 pm
Ratio       3:4, 1 : 2 : 3
Letter      B, (B)
Words       red, Paris 2024, 2024-01-02, and all that is nothing else
"""

from __future__ import annotations

from dataclasses import dataclass

from rewards.answers.numbers import Number


@dataclass(frozen=True, slots=True)
class Expression:
    text: str
    sign: str = ""


@dataclass(frozen=True, slots=True)
class Quantity:
    value: Number | Expression
    unit: str


@dataclass(frozen=True, slots=True)
class Several:
    """Several values. `brackets` are the brackets around them, and `u` stands for a union. Without brackets, the order
    does not count."""

    items: tuple[Kind, ...]
    brackets: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    names: tuple[str, ...]
    values: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """The relation `sides[0] operators[0] sides[1] ...`. The greater side is on the right."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Time:
    minutes: int
    seconds: int
    half: str


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Letter:
    letter: str


@dataclass(frozen=True, slots=True)
class Words:
    text: str


Kind = Number | Expression | Quantity | Several | Named | Relation | Time | Ratio | Letter | Words
