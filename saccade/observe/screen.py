"""All that is printed for people. Texts are shown as they are: none of what stands in them is taken for markup."""

from __future__ import annotations

from rich.console import Console, RenderableType


def say(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Print one line, which the terminal breaks where it must: paths can be copied out of it."""
    console.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, *things: RenderableType) -> None:
    """Print tables and the like; what stands in their cells is shown as it is."""
    console.print(*things, markup=False, highlight=False)
