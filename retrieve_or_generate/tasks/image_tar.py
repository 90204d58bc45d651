"""Tars of class folders as they are published: `imagenet-r.tar` with `imagenet-r/n01443537/art_0.jpg`, or a tar for each split.

Members are listed, never unpacked. The folder right above an image is its class; what stands above that, less what all images
have in common, is its split. An image is called as in the unpacked folder, so both are the same task.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.tasks.layout import Listing
from retrieve_or_generate.tasks.webdataset import TarMembers

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Place = tuple[int, int, int]
"""Which tar, first byte, bytes."""


@dataclass(frozen=True)
class ImageTars:
    """A tar whose folders are splits, or the one split `.`; or a folder with a tar for each split, which is called after it."""

    place: Path
    every_class: bool = True

    @property
    def where(self) -> str:
        return str(self.place)

    @cached_property
    def _tars(self) -> list[Path]:
        return [self.place] if self.place.is_file() else sorted(self.place.glob("*.tar"))

    @cached_property
    def _images(self) -> dict[str, list[tuple[str, str, Place]]]:
        """Of each split the images' class, key and place, in the order of unpacked folders: by class, then by name."""
        images: dict[str, list[tuple[str, str, Place]]] = {}
        for number, tar in enumerate(self._tars):
            found = [(PurePosixPath(name), place) for name, place in _members(tar, number)]
            shared = _shared([path.parents[1] for path, _ in found])
            for path, place in found:
                inner = path.parents[1].relative_to(shared).as_posix()
                split = inner if self.place.is_file() else tar.stem if inner == "." else f"{tar.stem}/{inner}"
                images.setdefault(split, []).append((path.parent.name, f"{path.parent.name}/{path.name}", place))
        return {split: sorted(mine, key=lambda image: image[:2]) for split, mine in images.items()}

    def splits(self) -> list[str]:
        return sorted(self._images)

    def labels(self, split: str) -> list[str]:
        return sorted({name for name, _, _ in self._images[split]})

    def listing(self, split: str) -> Listing:
        names, mine = self.labels(split), self._images[split]
        ids = {name: place for place, name in enumerate(names)}
        places = np.array([place for _, _, place in mine], np.int64)
        used, places[:, 0] = np.unique(places[:, 0], return_inverse=True)
        codes = np.array([ids[name] for name, _, _ in mine], np.int64)
        tars = [str(self._tars[number]) for number in used]
        return Listing([key for _, key, _ in mine], TarMembers(tars, places), codes, names)


def _members(path: Path, number: int) -> Iterator[tuple[str, Place]]:
    """Names of the images that lie in a folder, and where their bytes are."""
    try:
        with tarfile.open(path, "r:") as tar:  # a compressed one has no places to read from
            for member in tar:
                name = member.name.removeprefix("./").lstrip("/")
                if member.isreg() and name.lower().endswith(_SUFFIXES):
                    if "/" not in name:
                        raise UsageError(f"{path}: {name} lies in no folder; an image of a class lies in CLASS/")
                    yield name, (number, member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise IntegrityError(f"{path}: not a whole tar, or a compressed one: unpack that ({error})") from error


def _shared(folders: list[PurePosixPath]) -> PurePosixPath:
    """The longest path that all of them begin with."""
    return PurePosixPath(os.path.commonpath(folders) if folders else "")
