"""What is computed of a picture once and kept: embeddings, descriptors, hashes; and the cache that keeps it.

A cache holds arrays by content: a key over the hashes of the images, in their order, and what the array follows from beside
them. An array counts only while its recorded size and checksum match: one that is truncated, damaged, another's, or of images
that changed or moved is computed again, never used. (A cache that is trusted because it exists turns decontamination off without
a word.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.pixels import UndecodableImage, decode, to_square
from retrieve_or_generate.store import content_key, durable_file, read_seal, seal

CHUNK = 4096
"""Images described, and kept, together."""

_BATCH = 256
_VERSION = 1  # part of every key: raise when the same image gives another array


@dataclass(frozen=True)
class View:
    """What of a picture is looked at: its central `square`, or the `whole` of it whatever its shape, brought to `size` pixels."""

    name: str
    size: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 to (size, size, 3)."""
        if self.name == "square":
            return to_square(image, self.size)
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Kind:
    """One array of a picture: `compute` takes (n, 3, s, s) uint8 views, n may be 0; `fingerprint` names what else it rests on."""

    name: str
    fingerprint: str
    view: View
    compute: Callable[[np.ndarray], np.ndarray]

    def key(self, sha256: Sequence[str]) -> str:
        return content_key([_VERSION, self.name, self.fingerprint, self.view.name, self.view.size, list(sha256)])


class ArrayCache:
    """Arrays in one folder, each `<key>.npy` sealed by `<key>.json`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: set[str] = set()

    def read(self, key: str, rows: int) -> np.ndarray | None:
        """The array with this key; None if there is none of `rows` rows just as it was written."""
        self._used.add(key)
        name = f"{key}.npy"
        try:
            record = read_seal(self._folder, f"{key}.json", key)
            if record is None or list(record["files"]) != [name]:
                return None
            array = np.load(self._folder / name, allow_pickle=False)
        except (IntegrityError, ValueError, OSError, KeyError, TypeError, AttributeError):
            return None
        return array if isinstance(array, np.ndarray) and len(array.shape) and len(array) == rows else None

    def write(self, key: str, array: np.ndarray) -> None:
        path = self._folder / f"{key}.npy"
        with durable_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        seal(self._folder, f"{key}.json", key, [path])

    def keep_used(self) -> None:
        """Drop arrays that were not asked for since the cache was opened: those of images that are no longer there."""
        for path in self._folder.glob("*.*"):
            if path.stem not in self._used:
                path.unlink(missing_ok=True)


def describe(
    kinds: Sequence[Kind],
    sha256: Sequence[str],
    names: Sequence[str],
    read: Callable[[int, int], Sequence[bytes]],
    cache: ArrayCache,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """For each kind an array with a row for each image, in their order. An image is decoded once for all kinds, if at all.

    `read(start, stop)` gives encoded images, `names` what to call them. A call that was cut short goes on with the chunk that it
    was at. Raises `IntegrityError` naming an image that cannot be decoded.
    """
    chunks: list[list[np.ndarray]] = [[kind.compute(_stacked([], kind.view))] for kind in kinds]
    for start in range(0, len(sha256), CHUNK):
        stop = min(start + CHUNK, len(sha256))
        keys = [kind.key(sha256[start:stop]) for kind in kinds]
        arrays = [cache.read(key, stop - start) for key in keys]
        missing = [row for row, array in enumerate(arrays) if array is None]
        if missing:
            made = _computed([kinds[row] for row in missing], start, stop, names, read)
            for row, new in zip(missing, made, strict=True):
                cache.write(keys[row], new)
                arrays[row] = new
        for parts, array in zip(chunks, arrays, strict=True):
            assert array is not None
            parts.append(array)
        if progress:
            progress(stop, len(sha256))
    return [np.concatenate(parts) for parts in chunks]


def _computed(
    kinds: Sequence[Kind], start: int, stop: int, names: Sequence[str], read: Callable[[int, int], Sequence[bytes]]
) -> list[np.ndarray]:
    """The arrays of one chunk. Of the pictures only their views are held, and of a batch at a time."""
    parts: list[list[np.ndarray]] = [[] for _ in kinds]
    for first in range(start, stop, _BATCH):
        last = min(first + _BATCH, stop)
        views: dict[View, list[np.ndarray]] = {kind.view: [] for kind in kinds}
        for name, data in zip(names[first:last], read(first, last), strict=True):
            image = _decoded(data, name)
            for view, seen in views.items():
                seen.append(view.of(image))
        stacked = {view: _stacked(seen, view) for view, seen in views.items()}
        for kind, done in zip(kinds, parts, strict=True):
            done.append(kind.compute(stacked[kind.view]))
    return [np.concatenate(done) for done in parts]


def _decoded(data: bytes, name: str) -> np.ndarray:
    try:
        return decode(data)
    except UndecodableImage as error:
        raise IntegrityError(f"{name}: cannot be decoded ({error})") from error


def _stacked(images: Sequence[np.ndarray], view: View) -> np.ndarray:
    """(n, 3, s, s) uint8."""
    pixels = np.empty((len(images), view.size, view.size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
