"""The section `data`: which files, which columns, under which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from rollout.data.columns import Role
from vlm.section import ListOfOne, section

URLS = "urls"
"""The word in data.media_from that allows fetching."""
PIXELS_PER_BYTE = 50_000_000 / (20 * 2**20)
"""Limit of an image's pixels for each byte of data.max_media_bytes: what is small on disk must not fill the memory."""
SYSTEM_PROMPTS: Mapping[str, str] = {
    "think_answer": (
        "Look at what is shown and asked. First think it through inside <think> </think>, then give the final answer, "
        "and nothing else, inside <answer> </answer>."
    ),
}
"""Name -> shipped system prompt."""


@section
class DataConfig:
    train: Annotated[tuple[str, ...], ListOfOne]
    """Parquet, JSONL or JSON files (or glob patterns) of training prompts."""
    eval: Annotated[tuple[str, ...], ListOfOne] = ()
    """Files of held-out prompts; empty: no evaluation."""
    columns: dict[Role, str | None] = field(default_factory=dict)
    """Which column is the prompt, image, video, audio and answer. A role that is not named uses the column with a
    known name (docs/data.md lists them); null turns the role off. The prompt's own column as answer: its last turn is
    the answer. group: the column whose values evaluation reports separately."""
    system_prompt: str | None = None
    """System message put before every prompt that has none; the word 'think_answer' stands for the shipped one."""
    prompt_template: str | None = None
    """The last user message is made of this text, in which {prompt} stands for the row's text; markers <image>,
    <video>, <audio> in it are places for media."""
    shuffle: bool = True
    """Shuffle each epoch with the run's seed."""
    max_prompt_length: Annotated[int, Ge(1)] = 4096
    """Longest prompt in tokens, images expanded."""
    overlong_prompts: Literal["refuse", "truncate"] = "refuse"
    """Longer prompts are refused. truncate: the user's text loses its beginning instead; media, system message and the
    chat template's tokens stay."""
    max_media_bytes: Annotated[int, Ge(1)] = 20 * 2**20
    """Largest encoded image, video or sound in bytes. The largest image or frame in pixels is 2.4 times this number."""
    max_video_frames: Annotated[int, Ge(1)] = 8
    """Frames that a model is shown of a video, evenly spaced."""
    media_from: Annotated[tuple[str, ...], ListOfOne] = ()
    """Where media may come from: the folder in which their paths start and must stay (without one: the data file's),
    and the word 'urls' to fetch http and https URLs, each time their row comes up."""
    max_refused_share: Annotated[float, Ge(0), Le(1)] = 0.01
    """Share of rows that may be refused (unreadable image, no answer, too long) before the run stops."""

    @property
    def prompt_columns(self) -> dict[Role, str | None]:
        """Return the columns that prompts are made of: all but the one by which evaluation groups them."""
        return {role: column for role, column in self.columns.items() if role != "group"}

    @property
    def system_text(self) -> str | None:
        """Return the text of the system message."""
        return None if self.system_prompt is None else SYSTEM_PROMPTS.get(self.system_prompt, self.system_prompt)

    @property
    def max_image_pixels(self) -> int:
        """Return the most pixels of an image, or of a frame."""
        return round(self.max_media_bytes * PIXELS_PER_BYTE)

    @property
    def allow_urls(self) -> bool:
        """Return whether media are fetched by http and https."""
        return URLS in self.media_from

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the folders in `media_from`. A run has one at most."""
        return tuple(place for place in self.media_from if place != URLS)

    @property
    def root(self) -> Path | None:
        """Return the folder at which paths of media start, and out of which none may lead. None: that of each data
        file."""
        return Path(self.folders[0]).expanduser() if self.folders else None
