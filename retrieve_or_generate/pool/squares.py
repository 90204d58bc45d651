"""The central square of a picture for embedding: upright uint8, decoded no larger than its use asks for.

Plain JPEGs, nearly all of the web's, go through libjpeg-turbo alone, at half, a quarter or an eighth of their size where that still
leaves twice what the model takes (Pillow's `reducing_gap` of 2). Everything else, and every JPEG that is not plain, takes the one
safe decoder of `pixels`, which also says why bytes are no picture.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from retrieve_or_generate.pixels import MAX_PIXELS, decode

_GAP = 2
_ORIENTATION_TAG = 0x0112
_EXIF = b"Exif\0\0"
_APP1, _SOS = b"\xe1", b"\xda"


class Square(NamedTuple):
    """(side, side, 3) uint8, and the size of the picture that it was cut from, upright."""

    pixels: np.ndarray
    width: int
    height: int


def square_of(data: bytes, size: int) -> Square:
    """The square for a model that takes `size` pixels; it is larger, or smaller only where the picture is.

    Raises `UndecodableImage` as `pixels.decode` does.
    """
    return _plain_jpeg(data, size) if data.startswith(b"\xff\xd8\xff") else _careful(data)


def _careful(data: bytes) -> Square:
    image = decode(data)
    return Square(_central(image), image.shape[1], image.shape[0])


def _plain_jpeg(data: bytes, size: int) -> Square:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if width * height > MAX_PIXELS or colours not in ("YCbCr", "Gray"):
            return _careful(data)
        least = _GAP * size
        image = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, min_factor=_GAP)
    except ValueError:  # damaged, or of a kind that it does not know
        return _careful(data)
    turn = _orientation(data)
    wide = (height, width) if turn >= 5 else (width, height)
    return Square(_upright(_central(image), turn), *wide)


def _central(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 where there is none or its block is damaged."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) not in (b"", _SOS):
        if marker == b"\xff":  # bytes that fill the space before a marker
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _APP1 and data.startswith(_EXIF, at + 4):
            try:
                exif = Image.Exif()
                exif.load(data[at + 4 : at + 2 + length])
                return int(exif.get(_ORIENTATION_TAG, 1))
            except Exception:  # the block is untrusted bytes: Pillow answers damage with many types
                return 1
        at += 2 + max(length, 2)
    return 1


def _upright(square: np.ndarray, orientation: int) -> np.ndarray:
    """Turned as EXIF says: 2 mirrored, 3 upside down, 4 both, 5 to 8 the same with rows and columns exchanged."""
    if orientation in (5, 6, 7, 8):
        square = square.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        square = square[:, ::-1]
    if orientation in (3, 4, 7, 8):
        square = square[::-1]
    return square
