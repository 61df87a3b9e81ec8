"""The think/answer format: `<think>reasoning</think><answer>red</answer>`, and nothing else around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import ScoringRequest
from rollout.types import Verdict

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LAYOUT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


def format_problem(text: str) -> str:
    """Why `text` is not in the format; empty if it is."""
    for tag in TAGS:
        if (count := text.count(tag)) != 1:
            return f"{tag} occurs {count} times, not once"
    match = _LAYOUT.fullmatch(text)
    if match is None:
        return "the tags are out of order, or there is text outside of them"
    for part in ("think", "answer"):
        if not match[part].strip():
            return f"<{part}> is empty"
    return ""


def answer_text(text: str) -> str | None:
    """What stands in the only `<answer>...</answer>` of `text`, stripped; None where there is none or several."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside = text.partition("<answer>")[2]
    body, closing, _ = inside.partition("</answer>")
    return body.strip() if closing else None


@dataclass(frozen=True, slots=True)
class FormatReward:
    """1.0 for a completion in the think/answer format, 0.0 with the reason otherwise."""

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        problems = [format_problem(text) for text in request.completions]
        return [Verdict.scored(0.0 if problem else 1.0, reason=problem) for problem in problems]
