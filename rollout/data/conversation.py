"""Read a row as chat messages. The content of a message is a list of parts: texts, and places for media.

a text, {role, content} or {from, value} messages ─▶ Conversation ─▶ compose: template, media, system message ─▶ render
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollout.data.columns import MEDIA_ROLES
from rollout.data.rows import RowRefusedError, shown
from vlm.media.types import MediaKind

MessagePart = Mapping[str, Any]
"""`{"type": "text", "text": ...}`, or `{"type": "image"}`, "video", "audio": the place of one item."""
Message = Mapping[str, Any]
"""A message `{"role": "system" | "user" | "assistant", "content": [parts]}`."""

ROLES = ("system", "user", "assistant")
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}
"""LLaVA's names of the roles, in `from`."""
_MARKER = re.compile(r"<(image|video|audio)>")
SLOT = "{prompt}"
"""The marker in a template that the row's text replaces."""


@dataclass(frozen=True)
class Conversation:
    """The messages of one row as it has them, without the template and the system message of the configuration."""

    messages: tuple[Message, ...]
    plain: bool
    """Whether all contents are texts. If they have no marker, the media go before the text of the only user message."""

    @staticmethod
    def read(value: Any) -> Conversation:
        """Read a column's value. The markers `<image>`, `<video>`, `<audio>` become places. Raises RowRefusedError."""
        if isinstance(value, str):
            if not value.strip():
                raise RowRefusedError("bad prompt", "the prompt is empty")
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            found = "nothing" if value is None or value == [] else type(value).__name__
            raise RowRefusedError("bad prompt", f"expected a text or a list of chat messages, found {found}")
        turns = [_turn(message, n) for n, message in enumerate(value)]
        messages = tuple({"role": role, "content": _parts(content, n)} for n, (role, content) in enumerate(turns))
        return Conversation(messages, all(isinstance(content, str) for _, content in turns))

    def without_last_turn(self) -> tuple[Conversation, str]:
        """Return the conversation before the assistant's last turn, and the text of that turn. Raises RowRefusedError
        if there is none."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            raise RowRefusedError(
                "no answer",
                "the last message must be the assistant's, since it is the answer (data.columns.answer), but it "
                f"is the {last['role']}'s",
            )
        if any(part["type"] != "text" for part in last["content"]):
            raise RowRefusedError("bad answer", "the last message, which is the answer, contains media")
        return replace(self, messages=self.messages[:-1]), text_of(last)

    def check_speaker(self) -> None:
        """Raise RowRefusedError unless the last message is the user's and the user says something."""
        if not self.messages or self.messages[-1]["role"] != "user":
            role = self.messages[-1]["role"] if self.messages else "nobody"
            raise RowRefusedError(
                "bad prompt",
                f"the last message is the {role}'s; it must be the user's (if it is the expected answer, set "
                "data.columns.answer to the prompt's column)",
            )
        if not any(text_of(m).strip() or places([m]) for m in self.messages if m["role"] == "user"):
            raise RowRefusedError("bad prompt", "the user's messages are empty")

    # ------------------------------------------------------------------ the user's text

    @property
    def user_text(self) -> str:
        return "".join(text_of(m) for m in self.messages if m["role"] == "user")

    @property
    def words(self) -> str:
        """Return the user's texts. Pieces between media or other turns are on lines of their own."""
        return "\n".join(text for m in self.messages if m["role"] == "user" for text in texts_of(m))

    def keep_last(self, characters: int) -> Conversation:
        """Keep only the last `characters` of the user's text. Everything else, including places for media, stays
        unchanged."""
        messages: list[Message] = []
        for message in reversed(self.messages):
            if message["role"] == "user":
                parts: list[MessagePart] = []
                for part in reversed(message["content"]):
                    if part["type"] == "text":
                        text = part["text"][max(0, len(part["text"]) - characters) :]
                        characters -= len(text)
                        part = {**part, "text": text}
                    if part.get("text") != "":
                        parts.insert(0, part)
                message = {**message, "content": parts}
            messages.insert(0, message)
        return replace(self, messages=tuple(messages))

    # ------------------------------------------------------------------ the messages a model gets

    def compose(self, counts: Mapping[MediaKind, int], template: str | None, system: str | None) -> list[Message]:
        """Return the messages that the model gets, with a place for each of the row's media. `counts` are the items of
        each kind.

        `template` goes around a text with its markers, or around the parts from the first text to the last. Raises
        RowRefusedError if the row does not say where its media go."""
        messages = list(self.messages)
        if template is not None:
            content = messages[-1]["content"]
            first, stop = (0, len(content)) if self.plain else _span_of_texts(content)
            before, _, after = template.partition(SLOT)
            around = _joined(_joined(_split(before), content[first:stop]), _split(after))
            messages[-1] = {**messages[-1], "content": [*content[:first], *around, *content[stop:]]}
        users = [n for n, message in enumerate(messages) if message["role"] == "user"]
        found = places(messages)
        if not found and self.plain and len(users) == 1:
            media = [{"type": kind} for kind in MEDIA_ROLES for _ in range(counts.get(kind, 0))]
            messages[users[0]] = {**messages[users[0]], "content": [*media, *messages[users[0]]["content"]]}
        else:
            for kind in MEDIA_ROLES:
                has, given = found.count(kind), counts.get(kind, 0)
                if has != given:
                    raise RowRefusedError(
                        f"{kind} count", f"the prompt has {has} place(s) for {kind}s, but the row has {given} {kind}(s)"
                    )
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return messages


def places(messages: Sequence[Message]) -> list[MediaKind]:
    """Return the kind of each place for media in the messages, in order."""
    return [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]


def texts_of(message: Message) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def text_of(message: Message) -> str:
    return "".join(texts_of(message))


def _turn(value: Any, n: int) -> tuple[str, Any]:
    """Return role and content of a message in either form."""
    if isinstance(value, dict) and value.get("role") in ROLES:
        return value["role"], value.get("content")
    if isinstance(value, dict) and (role := SPEAKERS.get(str(value.get("from")))) is not None:
        return role, value.get("value")
    found = (value.get("role") or value.get("from")) if isinstance(value, dict) else type(value).__name__
    raise RowRefusedError(
        "bad prompt",
        f"message {n}: expected {{role, content}}, role one of {ROLES}, or {{from, value}}, from one of "
        f"{tuple(SPEAKERS)}, found {shown(found)}",
    )


def _parts(content: Any, n: int) -> list[MessagePart]:
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise RowRefusedError(
            "bad prompt", f"message {n}: content is {type(content).__name__}, not a text or list of parts"
        )
    return [part for given in content for part in _given_part(given, n)]


def _given_part(part: Any, n: int) -> list[MessagePart]:
    """Read a part without the null fields that Parquet adds to every part. A template takes any part with a key 'image'
    for an image."""
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
    kind = given.get("type")
    if kind in MEDIA_ROLES and given in ({"type": kind}, {"type": kind, "text": ""}):
        return [{"type": kind}]
    if given.keys() == {"type", "text"} and kind == "text" and isinstance(given["text"], str):
        return _split(given["text"])
    raise RowRefusedError(
        "bad prompt",
        f'message {n}: a part must be {{"type": "text", "text": ...}} or {{"type": "image"}}, "video" or "audio" (the '
        f"image itself comes from the image column), found {str(part)[:80]}",
    )


def _split(text: str) -> list[MessagePart]:
    """Split a text into parts. Markers become places for media."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowRefusedError("bad prompt", f"the text is not valid Unicode: {error}") from error
    pieces = _MARKER.split(text)  # text, kind, text, kind, ..., text
    parts: list[MessagePart] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _joined(left: Sequence[MessagePart], right: Sequence[MessagePart]) -> list[MessagePart]:
    """Join parts. Adjacent texts become one, since some chat templates trim every text."""
    if left and right and left[-1]["type"] == right[0]["type"] == "text":
        seam = {"type": "text", "text": left[-1]["text"] + right[0]["text"]}
        return [*left[:-1], seam, *right[1:]]
    return [*left, *right]


def _span_of_texts(parts: Sequence[MessagePart]) -> tuple[int, int]:
    """Return the slice from the first text through the last one; an empty slice at the end if there is no text."""
    texts = [n for n, part in enumerate(parts) if part["type"] == "text"]
    return (texts[0], texts[-1] + 1) if texts else (len(parts), len(parts))
