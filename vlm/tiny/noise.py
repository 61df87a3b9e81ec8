"""Make media of noise. Two items differ in every pixel and sample."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
from PIL import Image

from vlm.media.images import ImageLimits, digest
from vlm.media.types import Media
from vlm.media.video_audio import SOUND_RATE, check_sound, check_video

ANY_SIZE = ImageLimits(2**62, 2**62)


def noise_image(seed: int, width: int = 84, height: int = 56) -> Media:
    """Make a PNG image of noise."""
    buffer = io.BytesIO()
    Image.fromarray(_pixels(seed, height, width)).save(buffer, "PNG")
    return Media("image", digest(buffer.getvalue()), buffer.getvalue(), width, height)


def noise_video(
    seed: int, width: int = 84, height: int = 56, frames: int = 4, fps: int = 2, shown: int | None = None
) -> Media:
    """Make an MP4 video of noise, of which `shown` frames are shown, or all."""

    def encode(stream: Any) -> Any:
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for n in range(frames):
            yield from stream.encode(
                av.VideoFrame.from_ndarray(_pixels(seed + 1000 * n, height, width), format="rgb24")
            )

    return check_video(_container("mp4", "mpeg4", fps, encode), ANY_SIZE, shown or frames)


def noise_sound(seed: int, seconds: float = 1.0) -> Media:
    """Make a WAV sound of noise with one channel."""

    def encode(stream: Any) -> Any:
        samples = np.random.default_rng(seed).integers(-8000, 8000, (1, int(seconds * SOUND_RATE)), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = SOUND_RATE
        yield from stream.encode(frame)

    return check_sound(_container("wav", "pcm_s16le", SOUND_RATE, encode), ANY_SIZE)


def noise(kind: str, seed: int, **shape: Any) -> Media:
    """Make an item of `kind`. `shape` has the arguments of the functions above."""
    make: dict[str, Callable[..., Media]] = {"image": noise_image, "video": noise_video, "audio": noise_sound}
    return make[kind](seed, **shape)


def _pixels(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _container(suffix: str, codec: str, rate: int, encode: Any) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        for packet in encode(stream):
            container.mux(packet)
        container.mux(stream.encode())
    return buffer.getvalue()
