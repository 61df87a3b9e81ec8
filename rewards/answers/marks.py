"""Marks: find the part of a completion or gold text that is marked as the answer. Plain searches, in linear time.

\\boxed{3}                boxes side by side are one list: `\\boxed{1}, \\boxed{2}`
<answer>3</answer>
#### 3                   up to the end of the line
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MAX_BOXES = 32
"""The most boxes side by side that make one list."""
LINE = 400
"""The most characters that are read after a mark without an end."""

_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox) ?\{|\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(
    r"(?:[\s$,;.&]|\\[()\[\],;: ]|\\q?quad|\\text(?:rm)?\{\s*(?:and|or|,)?\s*\}|(?:and|or)(?![a-z])){0,24}"
)
_SIGN = re.compile(r"[ $]{0,2}(\\?%|percent|pct|°|\^ ?\{? ?\\circ ?\}?|degrees?)")


@dataclass(frozen=True, slots=True)
class Found:
    text: str
    rule: Literal["box", "answer", "phrase", "hash"]
    parts: tuple[str, ...] = ()
    """The contents of each box, if several are side by side."""
    sign: str = ""
    """A percent or degree sign after the box, as in `\\boxed{28}\\%`. It may be part of the answer."""

    @property
    def forms(self) -> tuple[str, ...]:
        return (self.text, self.text + self.sign) if self.sign else (self.text,)


def boxed(text: str) -> Found | None:
    """Return the content of the last box with balanced braces; that of several boxes side by side is joined by
    commas."""
    found = boxes(text)
    if not found:
        return None
    start, inside, end = found.pop()
    contents = [text[inside:end].strip()]
    sign = _SIGN.match(text, end + 1)
    while found and len(contents) < MAX_BOXES:
        before, inside, end = found.pop()
        if start - end > 40 or not _BETWEEN.fullmatch(text, end + 1, start):
            break
        if (content := text[inside:end].strip()) != contents[0]:
            contents.insert(0, content)
        start = before
    return Found(", ".join(contents), "box", tuple(contents), sign[1] if sign and len(contents) == 1 else "")


def boxes(text: str) -> list[tuple[int, int, int]]:
    """Yield (start, start of the content, end of the content) of the outermost boxes, in order."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    opened: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, int]] = []
    for match in _BRACES.finditer(text):
        sign = match[0]
        if sign == "{":
            opened.append(None)
        elif sign == "}":
            box = opened.pop() if opened else None
            if box is not None:
                while found and found[-1][0] > box[0]:
                    found.pop()
                found.append((*box, match.start()))
        elif sign.endswith("{") and len(sign) > 2:
            opened.append((match.start(), match.end()))
    return found


def tagged(text: str) -> Found | None:
    """Return the content of the last `<answer>..</answer>`."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return Found(text[start + len("<answer>") : end].strip(), "answer") if 0 <= start < end else None


def hashed(text: str) -> Found | None:
    """Return the text after the last `####`."""
    start = text.rfind("####")
    line = text[start + 4 : start + 4 + LINE].strip().partition("\n")[0].strip() if start >= 0 else ""
    return Found(line, "hash") if line else None
