"""One decoder for every source: right pixels or a reason, never a guess."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retrieve_or_generate.pixels import (
    MAX_PIXELS,
    UndecodableImage,
    decode,
    decode_all,
    decode_into,
    encode_jpeg,
    encode_png,
    suffix_of,
    to_square,
    with_border,
)
from retrieve_or_generate.settings import DownloadSettings


def _noise(height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _smooth(height: int = 24, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _reason(data: bytes) -> str:
    with pytest.raises(UndecodableImage) as caught:
        decode(data)
    return caught.value.reason


def test_png_keeps_every_pixel_and_jpeg_nearly() -> None:
    image = _smooth()
    assert np.array_equal(decode(encode_png(image)), image)
    assert np.abs(decode(encode_jpeg(image)).astype(int) - image).max() <= 12


def test_jpeg_keeps_colour_at_full_resolution() -> None:
    with Image.open(io.BytesIO(encode_jpeg(_noise()))) as image:
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # type: ignore[attr-defined]


def test_webp_decodes() -> None:
    image = _smooth()
    assert np.array_equal(decode(_saved(Image.fromarray(image), "WEBP", lossless=True)), image)


def test_grey_bilevel_and_palette() -> None:
    grey = _smooth()[..., 0]
    assert np.array_equal(decode(_saved(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, 2))
    bilevel = Image.fromarray(grey > 99)
    assert set(np.unique(decode(_saved(bilevel, "PNG")))) == {0, 255}
    palette = Image.fromarray(_smooth()).quantize(16)
    assert np.array_equal(decode(_saved(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white() -> None:
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    expected = np.rint(values / 257)
    assert np.array_equal(decode(_saved(Image.fromarray(values), "PNG"))[..., 0], expected)


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    image = _noise(4, 5)
    rows = b"".join(b"\0" + np.stack([row, row], -1).tobytes() for row in image)
    assert np.abs(decode(_png(5, 4, 16, 2, rows)).astype(int) - image).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_stand_on_white(mode: str) -> None:
    image = Image.new(mode, (8, 8), (10,) * (len(mode) - 1) + (0,))
    assert (decode(_saved(image, "PNG")) == 255).all()


def test_hidden_palette_colour_does_not_show() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert (decode(_saved(image, "PNG", transparency=1)) == 255).all()


def test_single_transparent_colour_is_honoured() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    pixels = decode(_saved(image, "PNG", transparency=(1, 2, 3)))
    assert pixels[0, 0].tolist() == [9, 9, 9]
    assert pixels[5, 5].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_with_a_transparent_value_is_refused() -> None:
    transparent = b"\0\0\0\2tRNS\0\7"
    extra = transparent + struct.pack(">I", zlib.crc32(transparent[4:]))
    assert _reason(_png(2, 1, 16, 0, b"\0\0\1\0\2", extra)) == "mode"


def test_cmyk_jpeg_has_the_colours_it_was_made_of() -> None:
    image = Image.fromarray(_smooth()).convert("CMYK")
    error = decode(_saved(image, "JPEG", quality=98, subsampling=0)).astype(int) - np.asarray(image.convert("RGB"))
    assert np.abs(error).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_stands_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _saved(Image.fromarray(_smooth()), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode(data), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("orientation", [3, 6])
def test_deep_greys_and_palettes_stand_upright_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = Image.fromarray(np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16))
    palette = Image.fromarray(_smooth()).quantize(16)
    for image in (deep, palette):
        plain, turned = decode(_saved(image, "PNG")), decode(_saved(image, "PNG", exif=exif))
        assert np.array_equal(turned, np.rot90(plain, {3: 2, 6: -1}[orientation]))


def test_damaged_exif_leaves_the_picture_as_stored() -> None:
    data = _saved(Image.fromarray(_smooth()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1")
    assert decode(data).shape == (24, 40, 3)


def test_encoders_write_no_metadata() -> None:
    for data in (encode_png(_noise()), encode_jpeg(_noise())):
        with Image.open(io.BytesIO(data)) as image:
            assert not image.getexif()
            assert not {"exif", "icc_profile", "comment", "xmp"} & set(image.info)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_other_formats_are_turned_away(kind: str) -> None:
    assert _reason(_saved(Image.fromarray(_noise(16, 16)), kind)) == "format"


@pytest.mark.parametrize("data", [b"<svg/>", b"%!PS-Adobe", b"RIFF\0\0\0\0WAVE", b"\x89PNG", b"<html>404</html>"])
def test_what_is_no_picture_is_turned_away(data: bytes) -> None:
    assert _reason(data) == "format"


def test_empty_bytes() -> None:
    assert _reason(b"") == "empty"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_moving_pictures_are_refused(kind: str) -> None:
    frames = [Image.fromarray(_noise(seed=seed)) for seed in range(3)]
    assert _reason(_saved(frames[0], kind, save_all=True, append_images=frames[1:])) == "animated"


def test_of_a_jpeg_with_several_pictures_the_first_is_the_picture() -> None:
    """Phones append a depth map or a second view to the photograph; a viewer shows the photograph."""
    first, second = Image.fromarray(_smooth()), Image.fromarray(_noise())
    data = _saved(first, "MPO", save_all=True, append_images=[second])
    assert suffix_of(data) == "jpg"
    assert np.abs(decode(data).astype(int) - _smooth()).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = _saved(Image.fromarray(_noise(64, 64)), kind)
    for share in (0.1, 0.5, 0.9):
        assert _reason(data[: int(len(data) * share)]) == "broken"


@pytest.mark.parametrize("size", [8_192 + 1, 10_000, 60_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(size: int) -> None:
    assert _reason(_png(size, size, 1, 0, b"\0")) in ("too_large", "broken")
    assert _reason(_png(size, 8_192, 8, 2, b"\0")) in ("too_large", "broken")


def test_the_pixel_limit_is_the_settings_and_can_be_lower() -> None:
    assert DownloadSettings().most_pixels == MAX_PIXELS
    data = encode_png(_noise(10, 10))
    assert decode(data, 100).shape == (10, 10, 3)
    with pytest.raises(UndecodableImage, match="10×10 pixels, more than 99"):
        decode(data, 99)


def test_text_and_profile_bombs_cost_nothing() -> None:
    """50 MB of zeros in a compressed text or profile chunk: 50 kB of file."""
    packed = zlib.compress(bytes(50_000_000), 9)
    for kind, head in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"profile\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")):
        chunk = kind + head + packed
        extra = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        tracemalloc.start()
        with suppress(UndecodableImage):
            assert decode(_png(2, 2, 8, 2, b"\0" + bytes(6) + b"\0" + bytes(6), extra)).shape == (2, 2, 3)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


def test_the_pixel_limit_is_a_reason_of_its_own() -> None:
    assert _reason(_png(8_192 + 1, 8_192, 1, 0, b"\0")) == "too_large"
    assert _reason(_png(30_000, 30_000, 1, 0, b"\0")) == "too_large"


_SEEDS = [
    encode_png(_noise()),
    encode_jpeg(_noise()),
    _saved(Image.fromarray(_noise()), "WEBP"),
    _saved(Image.fromarray(_noise()).quantize(8), "PNG"),
]
_REASONS = ("empty", "format", "too_large", "animated", "mode", "broken")


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "described"
    return exif


def _more_seeds() -> list[bytes]:
    """One of every kind that decodes: depths, palettes, transparency, profiles, interlacing, progression, several pictures."""
    rgb, grey = Image.fromarray(_noise(16, 20)), Image.fromarray(_noise(16, 20)[..., 0])
    deep = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)
    return [
        *_SEEDS,
        _saved(grey, "PNG"),
        _saved(deep, "PNG"),
        _saved(rgb.convert("RGBA"), "PNG", exif=_exif()),
        _saved(rgb.convert("CMYK"), "JPEG"),
        _saved(rgb, "JPEG", progressive=True, exif=_exif()),
        _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        _saved(rgb.convert("RGBA"), "WEBP", lossless=True, exif=_exif()),
        _saved(rgb.convert("1"), "PNG"),
    ]


def _mutant(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes flipped, overwritten with telling numbers, cut out, doubled, cut off, or swapped with another file's."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, size, how = int(rng.integers(len(out))), int(rng.integers(1, 9)), rng.integers(5)
        if how == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            out[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"][rng.integers(4)]
        elif how == 2:
            del out[at : at + size]
        elif how == 3:
            out[at:at] = out[at : at + size]
        else:
            del out[max(at, 4) :]
        if not out:
            break
    return bytes(out)


def test_ten_thousand_mutants_give_pixels_or_a_reason() -> None:
    rng, seeds, told = np.random.default_rng(0), _more_seeds(), Counter[str]()
    for turn in range(10_000):
        try:
            pixels = decode(_mutant(rng, seeds[turn % len(seeds)]))
            assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
            told["decoded"] += 1
        except UndecodableImage as error:
            told[error.reason] += 1
    assert told.total() == 10_000
    assert set(told) <= {"decoded", *_REASONS}
    assert min(told["decoded"], told["broken"], told["format"]) > 100, "the mutants reach the parsers"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_SEEDS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_damage_gives_pixels_or_a_reason(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        pixels, reason = decode(bytes(damaged)), ""
    except UndecodableImage as error:
        pixels, reason = np.zeros((0, 0, 3), np.uint8), error.reason
    assert reason in ("", *_REASONS)
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)


def test_suffixes() -> None:
    assert [suffix_of(seed) for seed in _SEEDS] == ["png", "jpg", "webp", "png"]


def test_a_square_of_the_right_size_is_left_alone() -> None:
    image = _noise(32, 32)
    assert to_square(image, 32) is image


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64), (20, 33)])
def test_squares_are_the_resized_and_cropped_picture(shape: tuple[int, int]) -> None:
    image = _smooth(*shape)
    scale = 32 / min(shape)
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = whole[top : top + 32, left : left + 32].astype(int)
    assert to_square(image, 32).shape == (32, 32, 3)
    assert np.abs(to_square(image, 32) - expected).mean() < 3


def test_a_ribbon_becomes_a_square_without_borders() -> None:
    assert (to_square(np.full((3, 30_000, 3), 7, np.uint8), 32) == 7).all()


def test_decode_all_keeps_order_and_layout() -> None:
    images = [_noise(32, 32, seed) for seed in range(3)]
    pixels = decode_all([encode_png(image) for image in images], 32)
    assert np.array_equal(pixels, np.stack(images).transpose(0, 3, 1, 2))
    assert decode_all([], 32).shape == (0, 3, 32, 32)
    with pytest.raises(UndecodableImage, match="format"):
        decode_all([encode_png(images[0]), b"no"], 32)


@pytest.mark.parametrize(
    ("shape", "inner"),
    [((48, 96), (16, 32)), ((96, 48), (32, 16)), ((64, 64), (32, 32)), ((3, 300), (1, 32)), ((300, 3), (32, 1))],
)
def test_with_a_border_the_whole_picture_is_shown(shape: tuple[int, int], inner: tuple[int, int]) -> None:
    image = _smooth(*shape)
    square = with_border(image, 32)
    top, left = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    shown = np.asarray(Image.fromarray(image).resize(inner[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(square[top : top + inner[0], left : left + inner[1]], shown)
    outside = np.ones((32, 32), bool)
    outside[top : top + inner[0], left : left + inner[1]] = False
    assert (square[outside] == 255).all()


def test_a_square_has_no_border() -> None:
    image = _noise(32, 32)
    assert np.array_equal(with_border(image, 32), image)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_are_decoded_in_order_on_any_number_of_threads(threads: int) -> None:
    images = [encode_png(_noise(20 + row % 7, 24, row)) for row in range(70)]
    pixels, told = np.empty((70, 3, 16, 16), np.uint8), []
    decode_into(pixels, images.__getitem__, threads=threads, progress=lambda done, total: told.append((done, total)))
    assert np.array_equal(pixels, np.stack([to_square(decode(image), 16) for image in images]).transpose(0, 3, 1, 2))
    assert told == [(done, 70) for done in (16, 32, 48, 64, 70)]
    images[50] = images[20] = b"<html>"
    with pytest.raises(UndecodableImage, match="format") as caught:
        decode_into(pixels, images.__getitem__, threads=threads)
    assert caught.value.row == 20


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    before = list(warnings.filters)
    decode_into(np.empty((40, 3, 8, 8), np.uint8), lambda row: encode_png(_noise(9, 9, row)), threads=4)
    assert warnings.filters == before
