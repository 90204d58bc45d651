"""Images decoded once to bytes per pixel at a working size, for all trials and all workers.

What is small is decoded into memory by whoever needs it: that takes less than to look it up. What is large lies in `decoded/` in
the cache folder, `<key>.npy` sealed by `<key>.json`, and is mapped into memory, so that workers share it and no more of it needs to
fit than they look at. The key follows from the images' bytes in their order, the size and the framing. A file that is truncated,
changed or swapped is made anew. Of more than `ROG_DECODED_GIB` (256) those go that were not used for longest.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.executors import core_count, tell
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.pixels import Framing
from retrieve_or_generate.store import (
    cache_folder,
    content_key,
    durable_file,
    locked,
    read_seal,
    remove_leftovers,
    seal,
)
from retrieve_or_generate.tasks.split import Images, Split

KEPT_FROM_BYTES = 2**26
_VERSION = 1  # part of every key: raise when the same image gives other pixels
_LIMIT = "ROG_DECODED_GIB"
_GIB = 2**30


@dataclass(frozen=True)
class SetImages(Images):
    """Images of a set, read when they are asked for."""

    of: ImageSet
    keys: Sequence[str]

    @cached_property
    def _places(self) -> list[tuple[str, str]]:
        return self.of.places(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def stored_in(self) -> Sequence[str]:
        return sorted({str(self.of.folder / shard) for shard, _ in self._places})

    def read(self, row: int) -> bytes:
        return self.of.image_at(self._places[row])


def decoded(split: Split, digest: Callable[[], str], size: int, framing: Framing = "square") -> np.ndarray:
    """(n, 3, size, size) uint8: every image of the split, in its order; `digest` names their bytes.

    Raises:
        IntegrityError: an image that is no picture, or not there. UsageError: the cache folder has no room.
    """
    shape = (len(split), 3, size, size)
    if math.prod(shape) < KEPT_FROM_BYTES:
        pixels = np.empty(shape, np.uint8)
        split.decode_into(pixels, framing)
        return pixels
    key, folder = content_key(["decoded", _VERSION, digest(), size, framing]), decoded_folder()
    while (found := _opened(folder, key)) is None:
        with locked(folder, wait=True):  # the others wait for whoever decodes
            if _opened(folder, key) is None:
                remove_leftovers(folder)
                _make(folder, key, split, shape, framing)
    return found


def decoded_folder() -> Path:
    return cache_folder() / "decoded"


def _opened(folder: Path, key: str) -> np.ndarray | None:
    """The array with this key, mapped; None if there is none just as it was written."""
    name = f"{key}.npy"
    try:
        record = read_seal(folder, f"{key}.json", key)
        if record is None or list(record["files"]) != [name]:
            return None
        pixels: np.ndarray = np.load(
            folder / name, mmap_mode="r"
        )  # what could be written to would count as memory taken
    except (IntegrityError, ValueError, OSError):
        return None
    os.utime(folder / f"{key}.json")
    return pixels


def _make(folder: Path, key: str, split: Split, shape: tuple[int, ...], framing: Framing) -> None:
    path, what = folder / f"{key}.npy", f"decoding {split.where}"
    _make_room(folder, math.prod(shape))
    with durable_file(path) as temporary:
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        with temporary.open("rb+") as file:  # written without room, mapped memory ends the process
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        split.decode_into(pixels, framing, core_count(), lambda done, total: tell(what, done, total))
        pixels.flush()
        del pixels
    seal(folder, f"{key}.json", key, [path])


def _make_room(folder: Path, needed: int) -> None:
    """Drop what was not used for longest, until `needed` more bytes are within the limit; `UsageError` if the disk has no room."""
    limit, kept = limit_bytes(), sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    sizes = {path: _bytes_of(path.with_suffix(".npy")) for path in kept}
    while kept and sum(sizes[path] for path in kept) + needed > limit:
        _drop(kept.pop(0))
    free = shutil.disk_usage(folder).free
    if needed > min(free, limit):
        raise UsageError(
            f"{folder}: images decoded take {needed / _GIB:.1f} GiB; {free / _GIB:.1f} are free, {limit / _GIB:.1f} allowed; set "
            f"ROG_CACHE to a folder on a larger disk, or {_LIMIT} higher"
        )


def limit_bytes() -> float:
    """What `decoded/` may hold; `UsageError` for a variable that is no number."""
    given = os.environ.get(_LIMIT, "256")
    try:
        return float(given) * _GIB
    except ValueError:
        raise UsageError(f"{_LIMIT}={given}: give a number of GiB") from None


def forget_decoded() -> None:
    """Drop all: of an image that was taken down no pixel may stay, and what holds it is not known."""
    folder = decoded_folder()
    if folder.is_dir():
        with locked(folder, wait=True):
            remove_leftovers(folder)
            for path in folder.glob("*.json"):
                _drop(path)


def _drop(sealed: Path) -> None:
    """The seal first: an array without one is nobody's."""
    sealed.unlink(missing_ok=True)
    sealed.with_suffix(".npy").unlink(missing_ok=True)


def _bytes_of(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
