"""A model family without a model, and small data files: what tests of the data side share."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rollout.data.config import DataConfig
from rollout.data.options import DataOptions
from rollout.data.source import PromptSource
from vlm.media.types import Media, MediaKind

if TYPE_CHECKING:
    from vlm.adapter import MultimodalAdapter

PLACES: dict[MediaKind, tuple[str, int]] = {"image": ("<img>", -1), "video": ("<vid>", -2), "audio": ("<snd>", -3)}
"""Placeholder and its token id by kind."""
IDS = dict(PLACES.values())


class FakeAdapter:
    """One token per character; a placeholder is one token and expands to one token per started 28 x 28 square (of each
    frame of a video), or second of sound."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = (*IDS, "</img>")
    control_tokens: ClassVar[Mapping[int, str]] = {number: token for token, number in IDS.items()}
    modalities: ClassVar[dict[MediaKind, Any]] = {k: SimpleNamespace(placeholder=p) for k, (p, _) in PLACES.items()}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        def content(message: Mapping[str, Any]) -> str:
            parts = message["content"]
            return "".join(p["text"].strip() if p["type"] == "text" else PLACES[p["type"]][0] for p in parts)

        return "".join(f"{m['role']}:{content(m)}\n" for m in messages) + "assistant:"

    def tokenize(self, text: str) -> list[int]:
        return [IDS.get(piece) or ord(piece) for piece in re.findall(r"<img>|<vid>|<snd>|.", text, re.DOTALL)]

    def media_order(self, token_ids: Sequence[int]) -> list[MediaKind]:
        kinds = {token: kind for kind, (_, token) in PLACES.items()}
        return [kinds[token] for token in token_ids if token in kinds]

    def expanded_length(self, token_ids: Sequence[int], media: Sequence[Media]) -> int:
        if any(max(m.width, m.height) > 200 * min(m.width, m.height) for m in media):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return len(token_ids) - len(media) + sum(map(self.tokens, media))

    def tokens(self, media: Media) -> int:
        if media.kind == "audio":
            return -(-media.samples // 16_000)
        return (len(media.frames) or 1) * -(-media.height // 28) * -(-media.width // 28)


class FakeImageAdapter(FakeAdapter):
    """A model that takes images alone."""

    modalities: ClassVar[dict[MediaKind, Any]] = {"image": FakeAdapter.modalities["image"]}


class FakeTextAdapter(FakeAdapter):
    """A model without eyes, whose template takes contents as they stand."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[dict[MediaKind, Any]] = {}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "".join(f"{m['role']}:{m['content']}\n" for m in messages) + "assistant:"


def fake_adapter() -> MultimodalAdapter:
    return cast("MultimodalAdapter", FakeAdapter())


def png(colour: Any = "red", size: tuple[int, int] = (28, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """Parquet, JSONL or JSON, by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def options_of(*files: Path, options: Mapping[str, Any] = MappingProxyType({}), **data: Any) -> DataOptions:
    """Options for training prompts. `data` is the section of that name, and `options` what DataOptions has beside
    it."""
    section = DataConfig(tuple(map(str, files)), **data)
    return DataOptions(section, section.train, shuffle=section.shuffle, **options)


def source(*files: Path, adapter: Any = None, **options: Any) -> PromptSource:
    return PromptSource(options_of(*files, **options), adapter or fake_adapter())
