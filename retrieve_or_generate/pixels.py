"""Image bytes from anywhere to RGB pixels, and back: one safe decoder and one preprocessing for every source.

Only JPEG, PNG and WebP are parsed; other formats are turned away before their parsers run. What cannot be shown as 8-bit RGB
without guessing is refused with a reason, because silent damage (16-bit greys gone white, hidden palette colours, photographs
lying on their side) would fall on retrieved images alone and never on generated ones.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Literal

import numpy as np
from PIL import Image

MAX_PIXELS = 2**26
_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
Framing = Literal["square", "paper"]
"""What of a picture is shown: its central square; as in 2406.05184 the whole of it, with white borders where it is not square."""
_CHUNK = 16  # pictures that a thread decodes at a time
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImage(ValueError):
    """Bytes that are no picture for us. `reason`: empty, format, too_large, animated, mode or broken; of many, `row` is which."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.row = reason, 0


def suffix_of(data: bytes) -> str:
    """`jpg`, `png` or `webp`, by the first bytes alone; raises `UndecodableImage` for anything else."""
    if not data:
        raise UndecodableImage("empty", "no bytes")
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise UndecodableImage("format", f"neither JPEG nor PNG nor WebP (starts with {data[:8]!r})")


def _check_header(image: Image.Image, most_pixels: int) -> None:
    width, height = image.size
    if width * height > most_pixels:
        raise UndecodableImage("too_large", f"{width}×{height} pixels, more than {most_pixels}")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise UndecodableImage("animated", "more than one frame")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (as stored) where the tag is missing or its block is damaged, as browsers do."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the block is untrusted bytes: Pillow answers damage with many types
        return 1


def _grey16(image: Image.Image) -> np.ndarray:
    if "transparency" in image.info:
        raise UndecodableImage("mode", "16-bit grey with a transparent value")
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _over_white(image: Image.Image) -> np.ndarray:
    """What a web page with a white background shows."""
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(canvas, rgba).convert("RGB"))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return _grey16(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _over_white(image)
    if image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    raise UndecodableImage("mode", f"pixel mode {image.mode}")


def _decode(data: bytes, most_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=tuple(_FORMATS)) as image:
        _check_header(image, most_pixels)
        turn = _UPRIGHT.get(_orientation(image))
        image.load()
        upright = image.transpose(turn) if turn is not None else image
        return _rgb(upright)


def decode(data: bytes, most_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Image bytes to upright (h, w, 3) uint8 RGB; transparent parts stand on white, CMYK is converted without its profile.

    Of a JPEG that holds several pictures (many phones store a depth map or a second view), the first is the picture. Raises
    `UndecodableImage` for every input that is not a whole, still JPEG, PNG or WebP of at most `most_pixels` pixels; the size is
    read from the header, before anything is unpacked.
    """
    with _quietly():
        return _checked(data, most_pixels)


@contextmanager
def _quietly() -> Iterator[None]:
    """Pillow's warnings unsaid, but for the one that is an error. Filters belong to the process, so threads share one block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _checked(data: bytes, most_pixels: int) -> np.ndarray:
    suffix_of(data)
    try:
        return _decode(data, most_pixels)
    except UndecodableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableImage("too_large", str(error)) from error
    except Exception as error:  # Pillow's parsers answer damage with at least seven types
        raise UndecodableImage("broken", f"{type(error).__name__}: {error}") from error


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) uint8 to (size, size, 3): the central square, bicubic with antialiasing; untouched if already that size.

    The same pixels as resizing the shorter side to `size` and cropping the centre, without ever holding the long side.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def with_border(image: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) uint8 to (size, size, 3): the longer side brought to `size`, bicubic with antialiasing, and white beside it.

    The shape that img2dataset's `resize_mode=border` gives, its default, which 2406.05184 stored retrieved images with.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    resized = Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BICUBIC)
    square[top : top + inner[0], left : left + inner[1]] = np.asarray(resized)
    return square


_FRAMED: dict[Framing, Callable[[np.ndarray, int], np.ndarray]] = {"square": to_square, "paper": with_border}


def decode_into(
    pixels: np.ndarray,
    read: Callable[[int], bytes],
    framing: Framing = "square",
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `pixels` (n, 3, size, size) uint8 with the images that `read(row)` gives, on so many threads.

    Decoders leave the interpreter to others meanwhile. `progress` is called with the rows done and their number.

    Raises:
        UndecodableImage: of the first row that is no picture; `row` says which.
    """
    size, framed = pixels.shape[-1], _FRAMED[framing]

    def fill(start: int) -> int:
        stop = min(start + _CHUNK, len(pixels))
        for row in range(start, stop):
            try:
                pixels[row] = framed(_checked(read(row), MAX_PIXELS), size).transpose(2, 0, 1)
            except UndecodableImage as error:
                error.row = row
                raise
        return stop

    starts = iter(range(0, len(pixels), _CHUNK))
    with _quietly(), ThreadPoolExecutor(threads) as pool:
        while some := list(islice(starts, 4 * threads)):  # a future for each of a million images would fill the memory
            for done in pool.map(fill, some):
                if progress:
                    progress(done, len(pixels))


def decode_all(data: Sequence[bytes], size: int, framing: Framing = "square") -> np.ndarray:
    """Many images to (n, 3, size, size) uint8, in their order. Raises `UndecodableImage` at the first that is none."""
    pixels = np.empty((len(data), 3, size, size), np.uint8)
    decode_into(pixels, data.__getitem__, framing)
    return pixels


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """(h, w, 3) uint8 to JPEG without chroma subsampling (at 32 pixels it would smear the colours) and without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """(h, w, 3) uint8 to PNG, lossless and without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
