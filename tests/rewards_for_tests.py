"""Rewards that vary on the output of random weights."""

from __future__ import annotations


def letters(completions: list[str], **columns: object) -> list[float | None]:
    """The share of letters in the text."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]
