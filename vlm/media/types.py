"""The type of images, videos and sounds before they are decoded. Standard library only, since it crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MediaKind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class Media:
    """One image, video or sound in its *encoded* form, or a reference to it.

    `data` is the file's bytes, or an object-store reference to them. Each distinct image is put into the store once,
    under its digest, and everything else carries the reference.
    """

    kind: MediaKind
    digest: str
    """SHA-256 of the encoded bytes (and, for a video, of the shown frames) in hex: the identity in every cache."""
    data: Any = field(repr=False)
    width: int = 0
    height: int = 0
    """Size in pixels of an image, or of a video's frames."""
    frames: tuple[int, ...] = ()
    """Video: indices of the shown frames in the file, ascending."""
    total_frames: int = 0
    fps: float = 0.0
    """Video: the number of frames of the file, and its frames per second."""
    samples: int = 0
    """Sound: its length in samples at 16 kHz."""
