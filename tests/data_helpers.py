"""A model family without a model, and small data files: what tests of the data side share."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rollout.prompts import DataOptions, PromptSource

if TYPE_CHECKING:
    from vlm.adapter import MultimodalAdapter


class FakeAdapter:
    """One token per character; `<img>` is one token and expands to one token per started 28 x 28 square."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<img>", "</img>")
    image_token = "<img>"
    has_vision = True

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        def content(message: Mapping[str, Any]) -> str:
            parts = message["content"]
            return "".join("<img>" if p["type"] == "image" else p["text"].strip() for p in parts)

        return "".join(f"{m['role']}:{content(m)}\n" for m in messages) + "assistant:"

    def tokenize(self, text: str) -> list[int]:
        return [-1 if piece == "<img>" else ord(piece) for piece in re.findall(r"<img>|.", text, re.DOTALL)]

    def count_images(self, token_ids: Sequence[int]) -> int:
        return sum(token == -1 for token in token_ids)

    def expanded_length(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
        if any(max(size) > 200 * min(size) for size in sizes):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return len(token_ids) - len(sizes) + sum(-(-h // 28) * -(-w // 28) for h, w in sizes)


class FakeTextAdapter(FakeAdapter):
    """A model without eyes, whose template takes contents as they stand."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ()
    image_token = ""
    has_vision = False

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "".join(f"{m['role']}:{m['content']}\n" for m in messages) + "assistant:"


def fake_adapter() -> MultimodalAdapter:
    return cast("MultimodalAdapter", FakeAdapter())


def png(colour: Any = "red", size: tuple[int, int] = (28, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """Parquet or JSONL, by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def source(*files: Path, adapter: Any = None, **options: Any) -> PromptSource:
    return PromptSource(DataOptions(tuple(map(str, files)), **options), adapter or fake_adapter())


TEXT_ONLY: dict[str, Any] = {"image_column": None, "answer_column": None}
