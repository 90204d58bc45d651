"""One split of a task: keys, labels, and encoded images that are read when they are asked for, wherever they lie.

ImageNet's 140 GB are never in memory: a split lists its images, and `images[row]` reads one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.pixels import Framing, UndecodableImage, decode_into


class Images(Sequence[bytes]):
    """Encoded images in a fixed order. A slice of them is a list that is read at once."""

    @abstractmethod
    def stored_in(self) -> Sequence[str]:
        """Every file that the images lie in."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The image at `row`, from 0 to len(self) − 1; `IntegrityError` names a file that is not what it was when it was listed."""

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        rows = range(len(self))[row]
        return self.read(rows) if isinstance(rows, int) else [self.read(each) for each in rows]


@dataclass(frozen=True)
class ImageFiles(Images):
    """A file for each image."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def stored_in(self) -> Sequence[str]:
        return self.paths

    def read(self, row: int) -> bytes:
        try:
            return Path(self.paths[row]).read_bytes()
        except OSError as error:
            raise IntegrityError(f"{self.paths[row]}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class ChosenImages(Images):
    """Those at `rows` of others."""

    of: Sequence[bytes]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def stored_in(self) -> Sequence[str]:
        if isinstance(self.of, ImageFiles):
            return [self.of.paths[row] for row in self.rows]
        return self.of.stored_in() if isinstance(self.of, Images) else ()

    def read(self, row: int) -> bytes:
        return self.of[int(self.rows[row])]


@dataclass(frozen=True)
class Split:
    """`keys` and encoded `images` in one order, and their `labels` (n,) int64. `where` is what messages call the split.

    `advice` follows where an image cannot be decoded.
    """

    keys: Sequence[str]
    images: Sequence[bytes]
    labels: np.ndarray
    where: str = ""
    advice: str = "rog tasks lists all such images of a task"

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> Split:
        """The images at these rows, in that order, still unread."""
        return Split(
            [self.keys[row] for row in rows],
            ChosenImages(self.images, rows),
            self.labels[rows],
            self.where,
            self.advice,
        )

    def decoded(self, size: int, rows: Sequence[int] | None = None) -> np.ndarray:
        """(n, 3, size, size) uint8, of all images or those at `rows`; `IntegrityError` names one that is no picture."""
        split = self if rows is None else self.take(np.asarray(rows, np.int64))
        pixels = np.empty((len(split), 3, size, size), np.uint8)
        split.decode_into(pixels)
        return pixels

    def decode_into(
        self,
        pixels: np.ndarray,
        framing: Framing = "square",
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Fill `pixels` (n, 3, size, size) uint8, as `pixels.decode_into` does; raises as `decoded`."""
        try:
            decode_into(pixels, self.images.__getitem__, framing, threads, progress)
        except UndecodableImage as error:
            hint = f"; {self.advice}" if self.advice else ""
            raise IntegrityError(f"{self.where}: {self.keys[error.row]}: cannot be decoded ({error}){hint}") from error


class Reader(Protocol):
    """Where one split lies. Reading lists it; images are read later."""

    def read(self) -> Split:
        """The split; a `UsageError` names what is missing or damaged, or a label that is of no class."""
