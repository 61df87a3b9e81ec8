"""Images from encoded bytes to RGB, the same way for every consumer, under limits checked before decoding."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError


class MediaError(ValueError):
    """An image that cannot be used; says why."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds on one image; whatever exceeds them is refused before its pixels are decoded."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    """Width x height of the decoded image."""


def digest(data: bytes) -> str:
    """The identity of a media item: sha256 of its encoded bytes."""
    return hashlib.sha256(data).hexdigest()


def check_image(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Decode once under `limits` and return `(width, height)` as `open_image` will show it. Raises MediaError."""
    if len(data) > limits.max_bytes:
        raise MediaError(f"image has {len(data):,} bytes, the limit is {limits.max_bytes:,} (data.max_image_bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"not a readable image: {error}") from error
    if width * height > limits.max_pixels:
        raise MediaError(
            f"image of {width} x {height} = {width * height:,} pixels, the limit is {limits.max_pixels:,} "
            "(data.max_image_pixels)"
        )
    return open_image(data).size


def open_image(data: bytes) -> Image.Image:
    """Decode to RGB: EXIF rotation applied, transparency laid over white, palettes and CMYK converted.

    Engine and learner both go through here, so that both see the same pixels. Raises MediaError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            image = Image.alpha_composite(canvas, rgba)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"not a readable image: {error}") from error
