"""Image bytes from anywhere to RGB pixels, and back: one safe decoder and one preprocessing for every source.

Only JPEG, PNG and WebP are parsed; other formats are turned away before their parsers run. What cannot be shown as 8-bit RGB
without guessing is refused with a reason, because silent damage (16-bit greys gone white, hidden palette colours, photographs
lying on their side) would fall on retrieved images alone and never on generated ones.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

MAX_PIXELS = 2**26
_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
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
    """Bytes that are no picture for us. `reason`: empty, format, too_large, animated, mode or broken."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


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
    suffix_of(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
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


def decode_all(data: Sequence[bytes], size: int) -> np.ndarray:
    """Many images to (n, 3, size, size) uint8, in their order. Raises `UndecodableImage` at the first that is none."""
    pixels = np.empty((len(data), size, size, 3), dtype=np.uint8)
    for row, one in enumerate(data):
        pixels[row] = to_square(decode(one), size)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


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
