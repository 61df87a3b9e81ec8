"""Rewards that vary on the output of random weights."""

from __future__ import annotations


def letters(completions: list[str], **columns: object) -> list[float | None]:
    """The share of letters in the text."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def letters_or_too_much(completions: list[str], spoiled: list[bool], **columns: object) -> list[float | None]:
    """The share of letters; in rows that are `spoiled`, scores that are finite and whose gradient is not."""
    return [3e38 * (k % 2) for k in range(len(completions))] if spoiled[0] else letters(completions)
