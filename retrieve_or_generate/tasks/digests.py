"""What a split's content is called: one hash over its keys, labels and the bytes of its images.

Reading ImageNet takes long, so the hash of a large split is kept in the cache folder, under what the system says of every file it
lies in: path, inode, size, times of the last writing and of the last change of any kind. A file that was touched has another.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

from retrieve_or_generate.store import cache_folder, write_bytes
from retrieve_or_generate.tasks.split import Images, Split

_CHUNK = 64
_THREADS = 8  # they wait for the disk; hashing leaves the interpreter free
_KEPT_FROM_BYTES = 2**26
_SETTLED_NS = 2 * 10**9  # a file that was changed this shortly ago may change again without another time


def split_digest(split: Split) -> str:
    """64 hex digits: of each image in its order key, label and sha256."""
    place = _place(split)
    if place and place.is_file():
        with suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{64}", kept := place.read_text()):
                return kept
    digest = hashlib.sha256()
    for key, label, image in zip(split.keys, split.labels.tolist(), _hashes(split), strict=True):
        digest.update(f"{key}\t{label}\t{image}\n".encode())
    if place:
        write_bytes(place, digest.hexdigest().encode())
    return digest.hexdigest()


def _hashes(split: Split) -> Iterator[str]:
    """Of the images in their order, a batch of chunks at a time: a future for each of a million images would fill the memory."""

    def hashed(start: int) -> list[str]:
        return [hashlib.sha256(image).hexdigest() for image in split.images[start : start + _CHUNK]]

    with ThreadPoolExecutor(_THREADS) as threads:
        for first in range(0, len(split), _CHUNK * _THREADS):
            starts = range(first, min(first + _CHUNK * _THREADS, len(split)), _CHUNK)
            yield from chain.from_iterable(threads.map(hashed, starts))


def _place(split: Split) -> Path | None:
    """Where the hash of a split that is large and lies still is kept."""
    files = split.images.stored_in() if isinstance(split.images, Images) else ()
    stats = [Path(path).stat() for path in files]
    newest = max((stat.st_ctime_ns for stat in stats), default=0)
    if sum(stat.st_size for stat in stats) < _KEPT_FROM_BYTES or newest > time.time_ns() - _SETTLED_NS:
        return None
    listing = hashlib.sha256()
    for path, stat in zip(files, stats, strict=True):
        listing.update(
            f"{os.path.realpath(path)}\t{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode()
        )
    for key, label in zip(split.keys, split.labels.tolist(), strict=True):
        listing.update(f"{key}\t{label}\n".encode())
    return cache_folder() / "task-digests" / listing.hexdigest()
