"""Decode videos and sounds in the same way for every consumer: chosen frames in RGB, and one channel at 16 kHz."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image

from vlm.media.images import ImageLimits, MediaError, MediaTooLargeError, digest, open_image
from vlm.media.types import Media

T = TypeVar("T")

SOUND_RATE = 16_000
"""Samples per second; all audio models here are trained on this rate."""
MIN_SAMPLES = SOUND_RATE // 10
"""Smallest length of a sound. The convolutions of a model would leave nothing of a shorter one."""


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of a video that the model sees."""

    frames: np.ndarray
    """RGB frames, uint8 `[F, H, W, 3]`."""
    indices: tuple[int, ...]
    """Indices of the frames in the file, ascending."""
    total: int
    """Frames of the file."""
    fps: float
    """Frames per second of the file."""

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that the processors of transformers and vLLM need for frames that were sampled
        already."""
        return {
            "fps": self.fps,
            "duration": self.total / self.fps,
            "total_num_frames": self.total,
            "frames_indices": list(self.indices),
            "video_backend": "pyav",
        }


Decoded = Image.Image | Video | np.ndarray
"""An image, a video, or a sound: float32 `[samples]` at SOUND_RATE."""


def decode(media: Media, data: bytes) -> Decoded:
    """Decode a media item with the encoded bytes `data` for engine and learner. Raises MediaError."""
    if media.kind == "image":
        return open_image(data)
    return open_video(data, media) if media.kind == "video" else open_sound(data)


def sample_frames(total: int, most: int) -> tuple[int, ...]:
    """Choose at most `most` of `total` frames, evenly over the whole video, including the first and the last."""
    return tuple(int(i) for i in np.linspace(0, total - 1, min(total, most)).round())


def check_video(data: bytes, limits: ImageLimits, max_frames: int) -> Media:
    """Decode once under `limits`, which apply to the file and to each frame, and choose the frames. Raises MediaError.

    The digest also covers the choice of frames: the same file with other frames is another video in every cache."""
    limits.check_bytes(len(data))

    def look(container: Any) -> Media:
        stream = _first(container, "video")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > limits.max_pixels:
            raise MediaTooLargeError(
                f"video of {width} x {height} = {width * height:,} pixels a frame, the limit is {limits.max_pixels:,} "
                "(it follows data.max_media_bytes)"
            )
        total = sum(1 for _ in container.decode(stream))
        if not total:
            raise MediaError("the video has no frames")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0:
            raise MediaError("the video does not state its frames per second")
        frames = sample_frames(total, max_frames)
        identity = digest(data + repr(frames).encode())
        return Media("video", identity, data, width, height, frames, total, fps)

    return _with_container(data, look)


def open_video(data: bytes, media: Media) -> Video:
    """Decode the chosen frames of `media` from its file. Raises MediaError."""
    wanted = set(media.frames)

    def read(container: Any) -> np.ndarray:
        decoded = container.decode(_first(container, "video"))
        found = [f.to_ndarray(format="rgb24") for n, f in enumerate(decoded) if n in wanted]
        if len(found) != len(media.frames):
            raise MediaError(f"{len(media.frames)} frames were chosen, but only {len(found)} of them found")
        return np.stack(found)

    return Video(_with_container(data, read), media.frames, media.total_frames, media.fps)


def check_sound(data: bytes, limits: ImageLimits) -> Media:
    """Decode once under the `limits` of the file. Raises MediaError."""
    limits.check_bytes(len(data))
    samples = len(open_sound(data))
    if samples < MIN_SAMPLES:
        raise MediaError(
            f"the sound has {samples / SOUND_RATE:.3f} s; models need at least {MIN_SAMPLES / SOUND_RATE} s"
        )
    return Media("audio", digest(data), data, samples=samples)


def open_sound(data: bytes) -> np.ndarray:
    """Decode a sound to float32 `[samples]` at SOUND_RATE, with its channels mixed to one. Raises MediaError."""

    def read(container: Any) -> np.ndarray:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SOUND_RATE)

        def pieces() -> Iterator[Any]:
            for frame in container.decode(_first(container, "audio")):
                yield from resampler.resample(frame)
            yield from resampler.resample(None)

        found = [piece.to_ndarray()[0] for piece in pieces()]
        if not found:
            raise MediaError("the sound has no samples")
        return np.concatenate(found)

    return _with_container(data, read)


def _first(container: Any, kind: str) -> Any:
    streams = getattr(container.streams, kind)
    if not streams:
        raise MediaError(f"the file has no {kind}")
    return streams[0]


def _with_container(data: bytes, use: Callable[[Any], T]) -> T:
    try:
        with av.open(io.BytesIO(data)) as container:
            return use(container)
    except MediaError:
        raise
    except Exception as error:  # the bytes may be damaged: libav then raises many kinds of exception
        raise MediaError(f"not a readable video or sound: {error!r}") from error
