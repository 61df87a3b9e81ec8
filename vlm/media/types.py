"""What an image, a video or a sound is, before it is decoded. Standard library only: it crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MediaKind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class Media:
    """One image, video or audio clip in its *encoded* form, or a reference to it.

    `data` is the file's bytes, or an object-store reference that resolves to them: a distinct image is put into
    the store once, under its digest, and everything else carries the reference.
    """

    kind: MediaKind
    digest: str
    """sha256 of the encoded bytes (of a video, with the frames that are shown), hex: the identity in every cache."""
    data: Any = field(repr=False)
    width: int = 0
    height: int = 0
    """In pixels, of an image or of a video's frames."""
    frames: tuple[int, ...] = ()
    """Of a video: which of the file's frames are shown, ascending."""
    total_frames: int = 0
    fps: float = 0.0
    """Of a video: all frames of the file, and how many of them make a second."""
    samples: int = 0
    """Of a sound: its length at 16 kHz."""
