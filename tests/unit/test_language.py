"""The mechanical part of the language rule: a docstring is a sentence.

A docstring may not begin with a fragment ("Of a run: ...", "What a run ..."), and its first paragraph ends with a full
stop. CONTRIBUTING.md has the rest of the rule, which only a reader can check.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("saccade", "rewards", "rollout", "learner", "vlm", "weight_sync", "bench", "deploy", "examples")
FRAGMENTS = ("Of ", "What ", "As many", "As much", "Whether and")
ENDS = (".", ".)", "?", ":")
"""A question or a colon may stand before a picture or an example."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a file, also of those below variables and fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            if isinstance(statement.value.value, str):
                yield statement.lineno, statement.value.value.strip()


def problem(text: str) -> str:
    """Say why a docstring is a fragment; empty if it is not."""
    if text.startswith(FRAGMENTS):
        return f"begins with {text.split()[0]!r}"
    summary = text.partition("\n\n")[0].rstrip()
    return "" if summary.endswith(ENDS) else f"its first paragraph ends with {summary[-20:]!r}, not with a full stop"


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("Return the rows.", False),
        ("Return the rows\n\nof a file.", True),
        ("What a run reads.", True),
        ("Of a run: its rows.", True),
        ("Does it fit?\n\n    a ──▶ b", False),
    ],
)
def test_fragments_are_recognised(text: str, fragment: bool) -> None:
    assert bool(problem(text)) == fragment


def test_docstrings_are_sentences(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}:{line}: {reason}: {text[:60]!r}"
        for room in ROOMS
        for path in sorted((repository / room).rglob("*.py"))
        for line, text in docstrings(path)
        if (reason := problem(text))
    ]
    assert not found, "\n" + "\n".join(found)
