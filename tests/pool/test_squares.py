"""The quick decoder shows what the careful one shows, and refuses what it refuses."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from retrieve_or_generate.pixels import UndecodableImage, decode, to_square
from retrieve_or_generate.pool import squares
from retrieve_or_generate.pool.squares import square_of


def picture(width: int, height: int) -> Image.Image:
    """Smooth, coloured, and without symmetry."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [200 * x * y + 20, 120 * x**2 + 60, 90 * y + 100 * (x > 0.7) * (y < 0.3)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def central(data: bytes) -> np.ndarray:
    image = decode(data)
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_the_careful_decoder_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(48, 40), exif=exif, quality=95)
    square = square_of(data, 32)
    assert np.abs(square.pixels.astype(int) - central(data)).max() <= 2
    assert (square.width, square.height) == decode(data).shape[1::-1]


def test_bytes_that_fill_the_space_before_a_marker() -> None:
    """There may be any number of them; a reader that takes them for a marker leaps to anywhere."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(48, 40), exif=exif, quality=95)
    filled = data[:2] + b"\xff" * 3 + data[2:]
    assert np.array_equal(square_of(filled, 32).pixels, square_of(data, 32).pixels)
    assert square_of(filled, 32).width == 40


def test_a_segment_that_leads_to_the_last_byte_ends_the_look() -> None:
    assert squares._orientation(b"\xff\xd8\xff\xfe\x00\x04ab\xff") == 1


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(40, 30).convert("L")),
        encoded(picture(40, 30).convert("CMYK")),
        encoded(picture(40, 30), "PNG"),
        encoded(picture(40, 30), "WEBP", lossless=True),
        encoded(picture(40, 30), progressive=True),
        encoded(picture(40, 30), subsampling=0),
        encoded(picture(40, 30).convert("RGBA"), "PNG"),
    ],
    ids=["grey", "cmyk", "png", "webp", "progressive", "444", "rgba"],
)
def test_kinds_of_images(data: bytes) -> None:
    assert np.abs(square_of(data, 24).pixels.astype(int) - central(data)).max() <= 2


def test_large_jpegs_are_decoded_at_a_reduced_size_that_still_shows_the_same() -> None:
    data = encoded(picture(900, 800), quality=95)
    square = square_of(data, 64)
    assert square.pixels.shape == (200, 200, 3)
    assert (square.width, square.height) == (900, 800)
    small = to_square(np.ascontiguousarray(square.pixels), 64).astype(int)
    assert np.abs(small - to_square(decode(data), 64)).mean() < 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(40), "format"),
        (encoded(picture(60, 50))[:-300], "broken"),
        (b"\xff\xd8\xff" + bytes(50), "broken"),
        (b"\xff\xd8\xff\xe1", "broken"),
        (encoded(Image.new("L", (9000, 9000))), "too_large"),
    ],
)
def test_what_is_no_picture_has_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableImage) as told:
        square_of(data, 32)
    assert told.value.reason == reason


def test_mutated_images_are_shown_or_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    seeds = [encoded(picture(24, 20), exif=exif), encoded(picture(24, 20), "PNG"), encoded(picture(24, 20), "WEBP")]
    shown = 0
    for turn in range(900):
        data = bytearray(seeds[turn % 3])
        for place in rng.integers(0, len(data), rng.integers(1, 9)):
            data[place] = rng.integers(256)
        try:
            shown += square_of(bytes(data[: rng.integers(1, 2 * len(data))]), 16).pixels.shape[2] == 3
        except UndecodableImage:
            continue
    assert 0 < shown < 900
