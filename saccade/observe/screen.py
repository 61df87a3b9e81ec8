"""Print for people. Texts are shown as they are; nothing in them is treated as markup."""

from __future__ import annotations

from rich.console import Console, RenderableType


def say(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Print one line. Only the terminal wraps it, so that paths can be copied."""
    console.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, *things: RenderableType) -> None:
    """Print tables and the like. The text in their cells is not treated as markup."""
    console.print(*things, markup=False, highlight=False)
