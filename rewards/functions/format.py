"""The think/answer format: `<think>reasoning</think><answer>red</answer>`.

    strict     each tag exactly once, in this order, both filled, nothing but white space around them
    lenient    tags in any case, text around them and further `<think>`s allowed; one filled answer, after the thinking
    newline    strict, and a line break after each opening and before each closing tag, one between the two blocks

The option `trace` says how the `<think>` trace is treated:

        visible    the format asks for it, and reports show it
        internal   the format asks for it, but reports and served outputs leave it out
        stripped   the format is the answer alone; a trace that is there anyway is not shown

Failure modes: the format does not check what the trace contains (`<think>x</think>` is enough), and a tag that a
completion only mentions counts as a tag. If the chat template opens `<think>` at the end of the prompt, that tag counts
as the beginning of the completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from rewards.base import ScoringRequest
from rollout.types import Verdict

Style = Literal["strict", "lenient", "newline"]
Trace = Literal["visible", "internal", "stripped"]
Scope = Literal["answer", "completion"]

_THINK = ("<think>", "</think>")
_ANSWER = ("<answer>", "</answer>")
_LAYOUTS = {
    "strict": (r"\s*<think>(?P<think>.*?)</think>", r"\s*<answer>(?P<answer>.*?)</answer>\s*"),
    "newline": (r"<think>\n(?P<think>.*?)\n</think>\n", r"<answer>\n(?P<answer>.*?)\n</answer>\n?"),
}
"""Layout -> pattern of the trace and the answer."""
_TRACE = re.compile(r"<think>.*?(?:</think>|\Z)\s*", re.DOTALL | re.IGNORECASE)
_END_OF_TRACE = re.compile(r"\A(?:(?!<think>).)*</think>\s*", re.DOTALL | re.IGNORECASE)


def format_problem(text: str, style: Style = "strict", trace: Trace = "visible") -> str:
    """Explain why `text` is not in the format; empty if it is."""
    lenient = style == "lenient"
    text = text.lower() if lenient else text
    for tag in _ANSWER if trace == "stripped" else (*_THINK, *_ANSWER):
        count = text.count(tag)
        if count == 0 or (count > 1 and not (lenient and tag in _THINK)):
            return f"{tag} occurs {count} times, not once"
    if trace == "stripped" and "<think>" in text:
        return "there is a <think>, but the format has none (trace: stripped)"
    blocks = _find_blocks(text, trace) if lenient else _match_blocks(text, style, trace)
    if blocks is None:
        text_outside = "" if lenient else ", or there is text outside of them"
        line_breaks = ", or line breaks are not where they belong" if style == "newline" else ""
        return f"the tags are out of order{text_outside}{line_breaks}"
    return next((f"<{name}> is empty" for name, body in blocks.items() if not body.strip()), "")


def _match_blocks(text: str, style: str, trace: Trace) -> dict[str, str] | None:
    think, answer = _LAYOUTS[style]
    match = re.fullmatch(answer if trace == "stripped" else think + answer, text, re.DOTALL)
    return match.groupdict() if match else None


def _find_blocks(text: str, trace: Trace) -> dict[str, str] | None:
    """Find the first trace and the only answer after it. Plain searches are used, since a pattern would take cubic time
    on text full of tags."""
    before, _, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    think, ended, _ = before.partition("<think>")[2].partition("</think>")
    if not closed or (trace != "stripped" and not ended):
        return None
    return {"answer": answer} if trace == "stripped" else {"think": think, "answer": answer}


def answer_text(text: str) -> str | None:
    """Return the stripped content of the only `<answer>...</answer>` in `text`; None if there is none, or several."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside = text.partition("<answer>")[2]
    body, closing, _ = inside.partition("</answer>")
    return body.strip() if closing else None


def judged_text(completion: str, scope: Scope) -> str | None:
    """Return the part of a completion that a reward compares: its only answer (None if there is none), or all of it."""
    return answer_text(completion) if scope == "answer" else completion.strip()


def placed(answer: str | None, scope: Scope) -> str | None:
    """Return a completion in which a reward with this scope finds exactly this answer."""
    return answer if answer is None or scope == "completion" else f"<answer>{answer}</answer>"


def unfenced(text: str, label: str) -> str:
    """Return the contents of a Markdown fence that is all of `text`, with `label` or without one. Other text is
    returned unchanged."""
    body = text.strip()
    if len(body) < 6 or not (body.startswith("```") and body.endswith("```")):
        return text
    body = body[3:-3].strip()
    return body[len(label) :] if body[: len(label)].lower() == label else body


def check_scope(scope: str) -> None:
    """Raise ValueError for an unknown scope."""
    one_of("scope", scope, get_args(Scope))


def one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError for an unknown value of an option, and name the known ones."""
    if value not in allowed:
        names = [repr(name) for name in allowed]
        raise ValueError(f"{option} must be {', '.join(names[:-1])} or {names[-1]}, not {value!r}")


def shown(text: str, trace: Trace) -> str:
    """Return a completion as reports and served outputs show it: without its trace, unless that is visible. A trace
    that does not end is removed to the end of the text; a trace that the prompt opened is removed from the
    beginning."""
    if trace == "visible":
        return text
    return _TRACE.sub("", _END_OF_TRACE.sub("", text)).strip()


@dataclass(frozen=True, slots=True)
class FormatReward:
    """Scores 1.0 for a completion in the think/answer format, and 0.0 with the reason otherwise."""

    separable: ClassVar[bool] = True
    style: Style = "strict"
    trace: Trace = "visible"

    def __post_init__(self) -> None:
        one_of("style", self.style, get_args(Style))
        one_of("trace", self.trace, get_args(Trace))

    def __call__(self, request: ScoringRequest) -> Sequence[Verdict]:
        opened = "<think>" if request.prompt.rstrip().endswith("<think>") and self.trace != "stripped" else ""
        if opened and self.style == "newline":
            opened += "\n" if request.prompt.endswith("\n") else ""
        problems = [format_problem(opened + text, self.style, self.trace) for text in request.completions]
        return [Verdict.scored(0.0 if problem else 1.0, reason=problem) for problem in problems]
