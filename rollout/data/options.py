"""The options of a source of prompts: its files, its columns and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rollout.data.columns import Role
from rollout.types import MEDIA_PER_PROMPT
from vlm.media.types import MediaKind

SYSTEM_PROMPTS: Mapping[str, str] = {
    "think_answer": (
        "Look at what is shown and asked. First think it through inside <think> </think>, then give the final answer, "
        "and nothing else, inside <answer> </answer>."
    ),
}
"""Name -> shipped system prompt."""


@dataclass(frozen=True)
class DataOptions:
    """The files, the columns and the limits."""

    files: tuple[str, ...]
    """Parquet, JSONL and JSON files, or glob patterns of them."""
    columns: Mapping[Role, str | None] = field(default_factory=dict)
    """Role -> column, or None for a role that no column plays. Other roles go to columns with known names."""
    extra_columns: tuple[str, ...] = ()
    """Further columns, passed to rewards unchanged."""
    optional_columns: tuple[str, ...] = ()
    """Further columns that are passed to rewards if all files have them."""
    answers_as_written: bool = False
    """Whether answers are programs or tests, in which nothing marks an answer."""
    system_prompt: str | None = None
    """System message for every prompt that has none. A key of SYSTEM_PROMPTS stands for its text."""
    prompt_template: str | None = None
    """Template of the last user message; {prompt} stands for the row's text."""
    shuffle: bool = True
    seed: int = 0
    """Seed of the shuffle."""
    max_prompt_length: int = 4096
    """Limit in tokens, with media expanded."""
    overlong_prompts: Literal["refuse", "truncate"] = "refuse"
    """truncate: cut the beginning of the user's text, and nothing else."""
    max_media: Mapping[MediaKind, int] = field(default_factory=lambda: dict(MEDIA_PER_PROMPT))
    """The most items of each kind in one prompt."""
    max_video_frames: int = 8
    max_image_bytes: int = 20 * 2**20
    """The most bytes of an encoded image, video or sound."""
    max_image_pixels: int = 50_000_000
    """The most pixels of an image, or of a frame."""
    root: str | None = None
    """Folder at which paths of media start, and out of which none may lead. None: the folder of each data file."""
    allow_urls: bool = False
    """Whether to fetch media by http and https."""
    max_refused_share: float = 0.01
    """The largest share of refused rows. Beyond it, DataError is raised."""
    window_bytes: int = 256 * 2**20
    """Memory for rows: the size of a shuffle window and of the block cache."""

    @property
    def system_text(self) -> str | None:
        return None if self.system_prompt is None else SYSTEM_PROMPTS.get(self.system_prompt, self.system_prompt)

    @property
    def root_folder(self) -> Path | None:
        return None if self.root is None else Path(self.root).expanduser()
