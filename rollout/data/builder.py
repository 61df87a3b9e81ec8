"""Build a Prompt from one row of data, or refuse the row with a reason.

columns ──▶ Conversation + bytes of media ──▶ adapter.render ──▶ adapter.tokenize ──▶ counts, lengths checked ──▶ Prompt
                    ▲ the user's text shortened from the left, if that is asked for ◀── too long
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from rewards.answers.golds import GoldError, gold_text, is_number
from rollout.data.columns import Columns, value_of
from rollout.data.conversation import Conversation, Message, MessagePart, places, text_of, texts_of
from rollout.data.media_files import MediaFiles
from rollout.data.rows import RowRefusedError, shown
from rollout.types import MEDIA_PER_PROMPT, Prompt, PromptRef
from vlm.media.images import ImageLimits, MediaError, MediaTooLargeError, check_image, digest
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import check_sound, check_video

if TYPE_CHECKING:
    from rollout.data.options import DataOptions
    from vlm.adapter import MultimodalAdapter

ANSWER_REFUSALS = ("no answer", "bad answer")
"""The kinds of refusal that are about the row's answer."""
CHECKED_KEPT = 100_000
"""How many checked media are remembered by digest, so that later epochs need not decode them again."""
MAX_CHARACTERS = 2**20
"""Limit of a row's prompt and of its answer. A tokenizer takes hundreds of bytes for each character."""
FORMS_KEPT = 1000
"""How many forms of conversations (roles, places for media) are remembered, with their template's tokens."""
WORD: MessagePart = {"type": "text", "text": "x"}


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model gets it."""

    text: str
    token_ids: Sequence[int]
    length: int
    """Length in tokens, with media expanded."""


class PromptBuilder:
    """Builds prompts for one model under one set of options. It caches checks of media and tokens of chat templates."""

    def __init__(self, options: DataOptions, columns: Columns, adapter: MultimodalAdapter) -> None:
        self.options = options
        self.data = data = options.data
        self.columns = columns
        self.adapter = adapter
        self.limits = ImageLimits(data.max_media_bytes, data.max_image_pixels)
        self.files = MediaFiles(root=data.root, allow_urls=data.allow_urls, max_bytes=data.max_media_bytes)
        placeholders = (m.placeholder for m in adapter.modalities.values())
        self._reserved = tuple(dict.fromkeys((*adapter.placeholder_tokens, *placeholders)))
        self._written: dict[str, Counter[int]] = {}
        """Form of a conversation -> control tokens that the chat template writes for it."""
        self._checked: dict[tuple[MediaKind, str], Media] = {}
        """Checked media, without their data."""

    def build(self, row: Mapping[str, Any], ref: PromptRef, directory: Path) -> Prompt:
        """Build the prompt of a row. Paths of media start at the root or `directory`. Raises RowRefusedError."""
        self._refuse_surprises(row)
        self._refuse_huge(row)
        conversation, answer = self._conversation_and_answer(row)
        found = {kind: self._read(kind, value_of(row, column), directory) for kind, column in self.columns.media}
        counts = {kind: len(items) for kind, items in found.items()}
        messages = self._compose(conversation, counts)
        for message in messages:
            self._refuse_placeholders(text_of(message))
        checked = {kind: iter([self._check(kind, d, n) for n, d in enumerate(data)]) for kind, data in found.items()}
        media = tuple(next(checked[kind]) for kind in places(messages))
        encoded, truncated = self._fit(conversation, counts, media)
        return Prompt(
            ref=ref,
            text=encoded.text,
            token_ids=np.asarray(encoded.token_ids, dtype=np.int32),
            expanded_length=encoded.length,
            media=media,
            answer=answer,
            numeric_answer=self._is_numeric(row),
            columns={name: value_of(row, name) for name in self.columns.extra},
            truncated=truncated,
            user_text=conversation.words,
        )

    def gold(self, row: Mapping[str, Any], ref: PromptRef) -> Prompt:
        """Return what a reward gets of a row without a model: answer, columns, words. Raises RowRefusedError."""
        conversation, answer = self._conversation_and_answer(row)
        columns = {name: value_of(row, name) for name in self.columns.extra}
        words, none = conversation.words, np.zeros(0, np.int32)
        numeric = self._is_numeric(row)
        return Prompt(ref, words, none, 0, answer=answer, numeric_answer=numeric, columns=columns, user_text=words)

    # ------------------------------------------------------------------ columns

    def _refuse_surprises(self, row: Mapping[str, Any]) -> None:
        if surprises := self.columns.surprises(row):
            raise RowRefusedError(
                "unexpected column",
                f"the row has {', '.join(map(shown, surprises))}, which the first rows do not have; set its role "
                "in data.columns (null ignores it)",
            )

    def _refuse_huge(self, row: Mapping[str, Any]) -> None:
        for column in dict.fromkeys((self.columns.prompt, self.columns.answer)):
            found = 0 if column is None else characters(value_of(row, column))
            if found > MAX_CHARACTERS:
                raise RowRefusedError(
                    "text too long", f"{column!r} has {found:,} characters, the limit is {MAX_CHARACTERS:,}"
                )

    def _is_numeric(self, row: Mapping[str, Any]) -> bool:
        return self.columns.answer is not None and is_number(value_of(row, self.columns.answer))

    def _conversation_and_answer(self, row: Mapping[str, Any]) -> tuple[Conversation, str | None]:
        columns, answer = self.columns, None
        if columns.answer is not None and not columns.answer_is_last_turn:
            answer = _gold(columns.answer, value_of(row, columns.answer), self.options.answers_as_written)
        conversation = Conversation.read(value_of(row, columns.prompt))
        if columns.answer_is_last_turn:
            conversation, last = conversation.without_last_turn()
            answer = _gold(columns.prompt, last, self.options.answers_as_written)
        conversation.check_speaker()
        return conversation, answer

    def _compose(self, conversation: Conversation, counts: Mapping[MediaKind, int]) -> list[Message]:
        return conversation.compose(counts, self.data.prompt_template, self.data.system_text)

    def _refuse_placeholders(self, text: str) -> None:
        """Refuse text that spells out a placeholder: it would be expanded to an image's tokens, or close an image."""
        for token in self._reserved:
            if token in text:
                raise RowRefusedError("placeholder in text", f"the text contains the model's own {token}")

    # ------------------------------------------------------------------ media

    def _read(self, kind: MediaKind, value: Any, directory: Path) -> list[bytes]:
        items = value if isinstance(value, list) else [] if value is None else [value]
        if items and kind not in self.adapter.modalities:
            raise RowRefusedError(f"{kind} count", f"{len(items)} {kind}(s), but the model takes none")
        most = MEDIA_PER_PROMPT[kind]
        if len(items) > most:
            raise RowRefusedError(f"{kind} count", f"{len(items)} {kind}s, the limit is {most}")
        return [self.files.read(item, kind, n, directory) for n, item in enumerate(items)]

    def _check(self, kind: MediaKind, data: bytes, n: int) -> Media:
        """Decode and check an item, unless a remembered check applies."""
        identity = (kind, digest(data))
        media = self._checked.get(identity)
        if media is None:
            try:
                media = replace(self._decode(kind, data), data=b"")
            except MediaTooLargeError as error:
                raise RowRefusedError(f"{kind} too large", f"{kind} {n}: {error}") from error
            except MediaError as error:
                raise RowRefusedError(f"bad {kind}", f"{kind} {n}: {error}") from error
            if len(self._checked) < CHECKED_KEPT:
                self._checked[identity] = media
        return replace(media, data=data)

    def _decode(self, kind: MediaKind, data: bytes) -> Media:
        if kind == "image":
            return Media("image", digest(data), data, *check_image(data, self.limits))
        if kind == "video":
            return check_video(data, self.limits, self.data.max_video_frames)
        return check_sound(data, self.limits)

    # ------------------------------------------------------------------ tokens

    def _fit(
        self, conversation: Conversation, counts: Mapping[MediaKind, int], media: Sequence[Media]
    ) -> tuple[Encoded, int]:
        """Return the prompt, and how many characters of the user's text were dropped to make it fit.

        Only the user's text is shortened, from its left, and the rest is rendered around it again. Places for media,
        the template's own tokens, the system message and the end, where the assistant speaks, stay unchanged."""
        limit = self.data.max_prompt_length
        whole = self._encode(self._compose(conversation, counts), media)
        if whole.length <= limit:
            return whole, 0
        reason = f"{whole.length} tokens with media expanded, the limit is {limit} (data.max_prompt_length)"
        if self.data.overlong_prompts == "refuse":
            raise RowRefusedError("prompt too long", reason)

        def shortened(characters: int) -> Encoded:
            return self._encode(self._compose(conversation.keep_last(characters), counts), media)

        text = conversation.user_text
        kept = largest(lambda characters: shortened(characters).length <= limit, len(text) - 1)
        if not text[len(text) - kept :].strip():
            raise RowRefusedError("prompt too long", f"{reason}; it is too long even without the user's text")
        return shortened(kept), len(text) - kept

    def _encode(self, messages: Sequence[Message], media: Sequence[Media]) -> Encoded:
        text, ids = self._render(messages)
        self._refuse_control_tokens(messages, ids)
        for message in messages:
            # Templates may cut the reasoning out of assistant turns; every word of the other turns must arrive.
            if message["role"] != "assistant" and any(part.strip() not in text for part in texts_of(message)):
                raise RowRefusedError("bad prompt", f"the chat template drops or changes text of the {message['role']}")
        order = self.adapter.media_order(ids)
        if order != [m.kind for m in media]:
            raise RowRefusedError(
                f"{next(m.kind for m in media) if media else order[0]} count",
                f"the rendered prompt has places for {', '.join(order) or 'nothing'}, the row has "
                f"{', '.join(m.kind for m in media) or 'no media'}; does the model's chat template take them?",
            )
        return Encoded(text, ids, self._expanded_length(ids, media))

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        if not self.adapter.modalities:  # templates of text models print a list of parts verbatim
            given = [{"role": m["role"], "content": text_of(m)} for m in messages]
        else:
            given = [dict(m) for m in messages]
        try:
            text = self.adapter.render(given)
            return text, self.adapter.tokenize(text)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise RowRefusedError(
                "bad prompt", f"the model's chat template or tokenizer refuses the prompt: {error!s:.120}"
            ) from error

    def _refuse_control_tokens(self, messages: Sequence[Message], ids: Sequence[int]) -> None:
        """Refuse text that becomes a control token, such as one that opens or ends a turn. Token ids are counted and
        compared with those that the template writes around other words, since templates trim texts and tokenizers
        normalise them."""
        control = self.adapter.control_tokens
        blank = [{**m, "content": [WORD if _says(part) else part for part in m["content"]]} for m in messages]
        form = repr(blank)
        if form not in self._written:
            if len(self._written) >= FORMS_KEPT:
                self._written.clear()
            self._written[form] = Counter(i for i in self._render(blank)[1] if i in control)
        forged = Counter(i for i in ids if i in control) - self._written[form]
        if forged:
            tokens = ", ".join(control[i] for i in forged)
            raise RowRefusedError(
                "control token in text", f"the text contains {tokens}, which only the model's chat template may write"
            )

    def _expanded_length(self, ids: Sequence[int], media: Sequence[Media]) -> int:
        try:
            return self.adapter.expanded_length(ids, media)
        except Exception as error:  # processors raise many kinds of exception for shapes that they cannot take
            shapes = ", ".join(f"{m.width} x {m.height}" if m.width else f"{m.samples} samples" for m in media)
            raise RowRefusedError("bad shape", f"the model's processor refuses {shapes:.80}: {error!s:.120}") from error


def _says(part: MessagePart) -> bool:
    return part["type"] == "text" and bool(part["text"].strip())


def characters(value: Any) -> int:
    """Count the characters of all texts in a value of a row."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters, inner))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest n from 1 to `most` that fits, or 0 if none fits. If n fits, everything smaller fits too.

    It tries about 2 log2(n) values, none above 2 n, so the cost depends on the result and not on `most`."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _gold(column: str, value: Any, as_written: bool) -> str:
    """Return the gold of a column's value. Raises RowRefusedError."""
    try:
        return gold_text(value, column, as_written=as_written)
    except GoldError as error:
        raise RowRefusedError(error.kind, error.reason) from error
