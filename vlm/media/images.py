"""Decode images to RGB in the same way for every consumer. Limits are checked before decoding."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Image.init()  # registers every plugin: otherwise Pillow does so on demand, and misses formats that are passed by name
IMAGE_FORMATS = tuple(f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if f in Image.OPEN)
"""The formats that are decoded. Pillow knows more, and some of them start other programs (EPS runs Ghostscript), so
they are not allowed."""

MIN_SIDE = 4
"""Smallest allowed side of an image, in pixels."""

# Our own limits come before Pillow's. Pillow's lower limit only warns; its upper one (twice as high) still refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class MediaError(ValueError):
    """An image cannot be used; the message says why."""


class MediaTooLargeError(MediaError):
    """An image exceeds the limits on bytes or pixels."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of one image. A larger image is refused before its pixels are decoded."""

    max_bytes: int
    max_pixels: int
    """Width x height of the decoded image."""

    def check_bytes(self, size: int) -> None:
        """Raise MediaTooLargeError if an encoded image of `size` bytes exceeds the limit."""
        if size > self.max_bytes:
            raise MediaTooLargeError(
                f"image has {size:,} bytes, the limit is {self.max_bytes:,} (data.max_media_bytes)"
            )


def digest(data: bytes) -> str:
    """Return the identity of a media item: the SHA-256 of its encoded bytes."""
    return hashlib.sha256(data).hexdigest()


def check_image(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Decode once under `limits` and return `(width, height)` as `open_image` will show it. Raises MediaError."""
    limits.check_bytes(len(data))
    image = _open(data)  # only the header: no pixel is decoded yet
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise MediaError(
            f"image of {width} x {height} pixels: a side must have at least {MIN_SIDE}, since processors take a "
            "smaller one for colour channels"
        )
    if width * height > limits.max_pixels:
        raise MediaTooLargeError(
            f"image of {width} x {height} = {width * height:,} pixels, the limit is {limits.max_pixels:,} "
            "(it follows data.max_media_bytes)"
        )
    return _decode(image).size


def open_image(data: bytes) -> Image.Image:
    """Decode to RGB. EXIF rotation is applied, transparency is put over white, 16-bit grey is scaled to 8 bits,
    palettes and CMYK are converted, and the first frame of an animation is taken.

    Engine and learner both use this function, so that both see the same pixels. Raises MediaError.
    """
    return _decode(_open(data))


def _open(data: bytes) -> Image.Image:
    """Read the header. Raises MediaError."""
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaTooLargeError(str(error)) from error
    except UnidentifiedImageError as error:
        raise MediaError(f"not a readable image ({', '.join(IMAGE_FORMATS)})") from error
    except Exception as error:
        # The bytes may be damaged: Pillow's parsers then raise almost any exception (OSError, SyntaxError,
        # struct.error, KeyError, ...), and each of them means the same here.
        raise MediaError(f"not a readable image: {error!r}") from error


def _decode(image: Image.Image) -> Image.Image:
    """Decode the pixels of an image whose header was read. Raises MediaError."""
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except MediaError:
        raise
    except Exception as error:  # as in _open
        raise MediaError(f"not a readable image: {error!r}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode. Raises MediaError for modes whose white point is not defined."""
    if image.mode in ("I", "F"):
        raise MediaError(f"32-bit pixels (mode {image.mode}) have no defined range; store the image with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns nearly every 16-bit image white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")
