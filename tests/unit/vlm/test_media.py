"""Images: every mode ends as the right RGB, and whatever cannot be used is refused with a reason, before it costs."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.media.images import IMAGE_FORMATS, ImageLimits, MediaError, MediaTooLargeError, check_image, digest, open_image

LIMITS = ImageLimits(max_bytes=10**6, max_pixels=10**5)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A valid PNG header that promises `width x height` pixels, and none of them."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_image(data)
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_modes_become_the_rgb_a_viewer_shows() -> None:
    assert pixel(encode(Image.new("RGB", (2, 2), (1, 2, 3)))) == (1, 2, 3)
    assert pixel(encode(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert pixel(encode(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert pixel(encode(palette)) == (10, 20, 30)
    assert pixel(encode(palette, transparency=1)) == (255, 255, 255)


def test_transparency_lies_over_white() -> None:
    assert pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encode(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    red, green, blue = pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert (red, green, blue) == (255, 127, 127)


def test_16_bit_grey_keeps_its_shades() -> None:
    shades = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = open_image(encode(Image.fromarray(shades)))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_pixels_are_refused(kind: type) -> None:
    data = encode(Image.fromarray(np.ones((4, 4), dtype=kind)), "TIFF")
    with pytest.raises(MediaError, match="no defined range"):
        check_image(data, LIMITS)


def test_exif_rotation_turns_size_and_pixels() -> None:
    image = Image.new("RGB", (6, 4), (0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: the first pixel moves to the top right
    data = encode(image, exif=exif)
    assert check_image(data, LIMITS) == (4, 6) == open_image(data).size
    assert pixel(data, 3, 0) == (255, 0, 0)


def test_a_side_that_could_be_taken_for_channels_is_refused() -> None:
    """transformers takes a side of 1 or 3 pixels for channels, and then expands to other tokens than it foretold."""
    for width, height in ((1, 1), (40, 1), (3, 40)):
        with pytest.raises(MediaError, match=rf"{width} x {height} pixels: a side must have at least"):
            check_image(encode(Image.new("L", (width, height))), LIMITS)
    assert check_image(encode(Image.new("L", (4, 4))), LIMITS) == (4, 4)
    assert check_image(encode(Image.new("L", (20_000, 4))), LIMITS) == (20_000, 4)


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    assert pixel(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


def test_too_many_bytes_are_refused_naming_the_knob() -> None:
    with pytest.raises(MediaTooLargeError, match=r"1,000,001 bytes.*1,000,000.*data\.max_media_bytes"):
        check_image(b"x" * (10**6 + 1), LIMITS)


def test_too_many_pixels_are_refused_from_the_header_alone() -> None:
    with pytest.raises(MediaTooLargeError, match=r"40000 x 4 = 160,000 pixels.*data\.max_media_bytes"):
        check_image(png_header(40_000, 4), LIMITS)
    with pytest.raises(MediaTooLargeError, match="decompression bomb"):
        check_image(png_header(2**30, 2**30), ImageLimits(10**6, max_pixels=2**62))


WHOLE = {
    name: encode(Image.new("RGB", (40, 40), "teal"), name) for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
}


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"\x00" * 200, png_header(4, 4), WHOLE["JPEG"][:300]])
def test_unreadable_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="not a readable image"):
        check_image(data, LIMITS)


@pytest.mark.parametrize("name", ["EPS", "PPM", "TGA"])
def test_other_formats_of_pillow_stay_shut(name: str) -> None:
    """EPS would run Ghostscript; the others are what nobody's data need."""
    assert name not in IMAGE_FORMATS
    with pytest.raises(MediaError, match="not a readable image"):
        check_image(encode(Image.new("RGB", (4, 4)), name), LIMITS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damage it can read past
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damage_gives_an_image_or_a_media_error_and_nothing_else(name: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))]
    with suppress(MediaError):
        size = check_image(bytes(damaged), LIMITS)
        assert open_image(bytes(damaged)).size == size


def test_digest_is_sha256() -> None:
    assert digest(b"abc") == hashlib.sha256(b"abc").hexdigest()
