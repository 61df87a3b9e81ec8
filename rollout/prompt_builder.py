"""One row of data -> one Prompt, or a refusal that says why.

columns ──▶ messages + image bytes ──▶ adapter.render ──▶ adapter.tokenize ──▶ counts and lengths checked ──▶ Prompt
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from rollout.rows import RowRefusedError
from rollout.types import Media, Prompt, PromptRef
from vlm.media import ImageLimits, MediaError, MediaTooLargeError, check_image, digest

if TYPE_CHECKING:
    from rollout.prompts import DataOptions
    from vlm.adapter import MultimodalAdapter

CHECKED_KEPT = 100_000
"""Images whose size is remembered by digest, so that later epochs need not decode them to check them."""
ROLES = ("system", "user", "assistant")


class PromptBuilder:
    """Builds prompts for one model under one set of options; remembers nothing but which images were found good."""

    def __init__(self, options: DataOptions, adapter: MultimodalAdapter) -> None:
        self.options = options
        self.adapter = adapter
        self.limits = ImageLimits(options.max_image_bytes, options.max_image_pixels)
        self._checked: dict[str, tuple[int, int]] = {}

    def build(self, row: Mapping[str, Any], ref: PromptRef, directory: Path) -> Prompt:
        """`directory` is where relative image paths start. Raises RowRefusedError."""
        options = self.options
        answer = None if options.answer_column is None else _answer(row.get(options.answer_column))
        value = row.get(options.image_column) if options.image_column is not None else None
        images = self._images(value, directory)
        messages = self._messages(row.get(options.prompt_column), len(images))
        media = tuple(self._media(data, n) for n, data in enumerate(images))
        text, ids = self._encode(messages, len(images))
        return Prompt(
            ref=ref,
            text=text,
            token_ids=np.asarray(ids, dtype=np.int32),
            expanded_length=self._expanded_length(ids, media),
            media=media,
            answer=answer,
            columns={name: row.get(name) for name in options.extra_columns},
        )

    # ------------------------------------------------------------------ images

    def _images(self, value: Any, directory: Path) -> list[bytes]:
        if value is None:
            return []
        items = value if isinstance(value, list) else [value]
        if items and not self.adapter.has_vision:
            raise RowRefusedError("image count", f"{len(items)} image(s) for a model that takes none")
        if len(items) > self.options.max_images:
            raise RowRefusedError("image count", f"{len(items)} images, the limit is {self.options.max_images}")
        return [self._image_bytes(item, f"image {n}: ", directory) for n, item in enumerate(items)]

    def _image_bytes(self, item: Any, where: str, directory: Path) -> bytes:
        if isinstance(item, dict):
            data = item.get("bytes")
            item = data if data is not None else item.get("path")
            if data is not None and not isinstance(data, bytes):
                raise RowRefusedError("bad image", f"{where}'bytes' holds {type(data).__name__}, not bytes")
            if item is None:
                raise RowRefusedError("missing image", f"{where}neither 'bytes' nor 'path' is given")
        if isinstance(item, bytes):
            return item
        if isinstance(item, str):
            return self._read_image(item, where, directory)
        kind = "missing image" if item is None else "bad image"
        raise RowRefusedError(kind, f"{where}expected bytes, {{bytes, path}} or a path, found {type(item).__name__}")

    def _read_image(self, name: str, where: str, directory: Path) -> bytes:
        if "://" in name or name.startswith("data:"):
            raise RowRefusedError(
                "bad image", f"{where}{name[:80]!r} is a URL, and none is fetched; store bytes or a path"
            )
        path = directory / name
        try:
            if not path.is_file():
                raise RowRefusedError("missing image", f"{where}no file {path}")
            self.limits.check_bytes(path.stat().st_size)
            return path.read_bytes()
        except MediaTooLargeError as error:
            raise RowRefusedError("image too large", f"{where}{path}: {error}") from error
        except OSError as error:
            raise RowRefusedError("missing image", f"{where}{path} cannot be read: {error}") from error

    def _media(self, data: bytes, n: int) -> Media:
        identity = digest(data)
        try:
            size = self._checked.get(identity) or check_image(data, self.limits)
        except MediaTooLargeError as error:
            raise RowRefusedError("image too large", f"image {n}: {error}") from error
        except MediaError as error:
            raise RowRefusedError("bad image", f"image {n}: {error}") from error
        if len(self._checked) < CHECKED_KEPT:
            self._checked[identity] = size
        return Media("image", identity, data, *size)

    # ------------------------------------------------------------------ messages

    def _messages(self, value: Any, images: int) -> list[dict[str, Any]]:
        """Chat messages whose contents are lists of parts, with exactly `images` image parts."""
        if isinstance(value, str):
            if not value.strip():
                raise RowRefusedError("bad prompt", "the prompt is empty")
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            found = "nothing" if value is None or value == [] else type(value).__name__
            raise RowRefusedError("bad prompt", f"expected a text or a list of chat messages, found {found}")
        messages = [_message(m, n) for n, m in enumerate(value)]
        if messages[-1]["role"] != "user":
            raise RowRefusedError(
                "bad prompt", f"the last message is the {messages[-1]['role']}'s; it must be the user's"
            )
        self._place_images(value, messages, images)
        if self.options.system_text is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.options.system_text}]})
        if not any(_text(m).strip() or _count_images(m) for m in messages if m["role"] == "user"):
            raise RowRefusedError("bad prompt", "the user's messages are empty")
        for message in messages:
            self._refuse_placeholders(_text(message))
        return messages

    def _place_images(self, value: list[Any], messages: list[dict[str, Any]], images: int) -> None:
        """Put images before the user's text where the row does not say where they belong."""
        places = sum(_count_images(m) for m in messages)
        users = [m for m in messages if m["role"] == "user"]
        if not places and len(users) == 1 and all(isinstance(m["content"], str) for m in value):
            users[0]["content"] = [{"type": "image"}] * images + users[0]["content"]
        elif places != images:
            raise RowRefusedError("image count", f"the messages hold {places} image part(s), the row {images} image(s)")

    def _refuse_placeholders(self, text: str) -> None:
        """A placeholder written out in the text would be expanded to an image's tokens, or close one."""
        for token in (*self.adapter.placeholder_tokens, self.adapter.image_token):
            if token and token in text:
                raise RowRefusedError("placeholder in text", f"the text holds the model's own {token}")

    # ------------------------------------------------------------------ tokens

    def _encode(self, messages: list[dict[str, Any]], images: int) -> tuple[str, Sequence[int]]:
        if not self.adapter.has_vision:  # templates of text models print a list of parts as it stands
            messages = [{"role": m["role"], "content": _text(m)} for m in messages]
        try:
            text = self.adapter.render(messages)
            ids = self.adapter.tokenize(text)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise RowRefusedError(
                "bad prompt", f"the model's chat template or tokenizer refuses it: {error}"
            ) from error
        for message in messages:
            # Templates may cut the reasoning out of assistant turns; of the others every word must arrive.
            if message["role"] != "assistant" and any(part.strip() not in text for part in _texts(message)):
                raise RowRefusedError("bad prompt", f"the chat template drops or alters text of the {message['role']}")
        count = self.adapter.count_images(ids)
        if count != images:
            raise RowRefusedError(
                "image count", f"the rendered prompt has {count} image placeholder(s), the row {images}"
            )
        return text, ids

    def _expanded_length(self, ids: Sequence[int], media: Sequence[Media]) -> int:
        try:
            length = self.adapter.expanded_length(ids, [(m.height, m.width) for m in media])
        except ValueError as error:
            sizes = ", ".join(f"{m.width} x {m.height}" for m in media)
            raise RowRefusedError("bad image", f"the model's image processor refuses {sizes}: {error}") from error
        if length > self.options.max_prompt_length:
            raise RowRefusedError(
                "prompt too long",
                f"{length} tokens with images expanded, the limit is {self.options.max_prompt_length} "
                "(data.max_prompt_length)",
            )
        return length


def _message(value: Any, n: int) -> dict[str, Any]:
    """One message with its content as a list of parts, stripped of the null fields that Parquet adds to every part:
    templates take a part that merely *has* a key 'image' for an image."""
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        found = value.get("role") if isinstance(value, dict) else type(value).__name__
        raise RowRefusedError(
            "bad prompt", f"message {n}: expected {{role, content}}, role one of {ROLES}, found {found!r}"
        )
    content = value.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RowRefusedError(
            "bad prompt", f"message {n}: content is {type(content).__name__}, not a text or list of parts"
        )
    return {"role": value["role"], "content": [_part(part, n) for part in content]}


def _part(part: Any, message: int) -> dict[str, Any]:
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
    if given in ({"type": "image"}, {"type": "image", "text": ""}):
        return {"type": "image"}
    if given.keys() == {"type", "text"} and given["type"] == "text" and isinstance(given["text"], str):
        try:
            given["text"].encode()
        except UnicodeEncodeError as error:
            raise RowRefusedError("bad prompt", f"message {message}: the text is no valid Unicode: {error}") from error
        return given
    raise RowRefusedError(
        "bad prompt",
        f'message {message}: a part must be {{"type": "text", "text": ...}} or {{"type": "image"}} (the image itself '
        f"comes from the image column), found {str(part)[:80]}",
    )


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]


def _text(message: Mapping[str, Any]) -> str:
    return "".join(_texts(message))


def _count_images(message: Mapping[str, Any]) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _answer(value: Any) -> str:
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    ):
        raise RowRefusedError("no answer", "the row has no answer")
    if not isinstance(value, str | int | float | Decimal):
        raise RowRefusedError("bad answer", f"the answer must be a text or a number, found {type(value).__name__}")
    return str(value)
