"""CLIP_benchmark's layout: `SPLIT/{nshards.txt,0.tar,…}` with an image and a `.cls` for every key.

`classnames.txt` says what the numbers of the `.cls` files are called. Members are listed, never unpacked; an image is read from its
place in the tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.tasks.layout import Listing
from retrieve_or_generate.tasks.split import Images
from retrieve_or_generate.tasks.words import CLASS_NAMES, class_names_in

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_NUMBER = re.compile(r"[0-9]{1,6}")  # of shards or classes: where these have no names, all below the largest are listed
_LONGEST_LABEL = 64  # bytes of a .cls that are read


@dataclass(frozen=True)
class TarMembers(Images):
    """Members of tars: image i is `places[i]`, (which file, first byte, bytes)."""

    tars: Sequence[str]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def stored_in(self) -> Sequence[str]:
        return self.tars

    def read(self, row: int) -> bytes:
        tar, start, size = self.places[row].tolist()
        with Path(self.tars[tar]).open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise IntegrityError(f"{self.tars[tar]}: shorter than when it was listed")
        return data


@dataclass(frozen=True)
class Webdataset:
    """A folder with a sub-folder of tars for each split."""

    folder: Path
    every_class: bool = False

    @property
    def where(self) -> str:
        return str(self.folder)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the numbers of the `.cls` files are called; nothing where `classnames.txt` is not there."""
        path = self.folder / CLASS_NAMES
        return class_names_in(path) if path.is_file() else ()

    def labels(self, split: str) -> Sequence[str]:
        return self.names or self.listing(split).names

    def splits(self) -> list[str]:
        return sorted({path.parent.name for path in [*self.folder.glob("*/*.tar"), *self.folder.glob("*/nshards.txt")]})

    def listing(self, split: str) -> Listing:
        found = _Members()
        paths = _shards(self.folder / split)
        for shard, path in enumerate(paths):
            try:
                with tarfile.open(path, "r:") as tar:  # a compressed one has no places to read from
                    found.add(shard, path, tar, len(self.names))
            except (tarfile.TarError, EOFError, OSError) as error:
                raise IntegrityError(f"{path}: not a whole tar ({error})") from error
        found.check(self.folder / split)
        keys = found.unique_keys(paths)
        codes = np.array([found.labels[key] for key in found.images], np.int64)
        places = np.array(list(found.images.values()), np.int64).reshape(-1, 3)
        names = self.names or [str(label) for label in range(int(codes.max()) + 1)]
        return Listing(keys, TarMembers([str(path) for path in paths], places), codes, names)


@dataclass
class _Members:
    """Places of images and labels by (shard, key): keys may begin anew in every shard."""

    images: dict[tuple[int, str], tuple[int, int, int]] = field(default_factory=dict)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, shard: int, path: Path, tar: tarfile.TarFile, classes: int) -> None:
        for member in tar:
            folder, _, file_name = member.name.removeprefix("./").rpartition("/")
            stem, _, suffix = file_name.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            file = tar.extractfile(member) if suffix == "cls" and member.isreg() else None
            if file:
                self.labels[shard, name] = _label(file.read(_LONGEST_LABEL), classes, f"{path}: {member.name}")
            elif suffix.lower() in _IMAGE_SUFFIXES and member.isreg():
                if (shard, name) in self.images:
                    raise IntegrityError(f"{path}: {name} has two images")
                self.images[shard, name] = (shard, member.offset_data, member.size)

    def check(self, folder: Path) -> None:
        if self.images.keys() != self.labels.keys() or not self.images:
            odd = sorted(name for _, name in self.images.keys() ^ self.labels.keys())[:3]
            raise IntegrityError(
                f"{folder}: {len(self.images)} images but {len(self.labels)} labels (first without its partner: {odd})"
            )

    def unique_keys(self, paths: Sequence[Path]) -> list[str]:
        names = [name for _, name in self.images]
        if len(set(names)) == len(names):
            return names
        return [f"{paths[shard].stem}/{name}" for shard, name in self.images]


def _shards(folder: Path) -> list[Path]:
    """The tars that `nshards.txt` announces; without it, all there are."""
    count = folder / "nshards.txt"
    if count.is_file():
        text = count.read_text().strip()
        if not _NUMBER.fullmatch(text):
            raise IntegrityError(f"{count}: {text[:40]!r} is not a number of shards")
        paths = []
        for path in (folder / f"{i}.tar" for i in range(int(text))):
            if not path.is_file():
                raise IntegrityError(f"{path}: missing; {count} announces {text} shards")
            paths.append(path)
    else:
        paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UsageError(f"{folder}: no webdataset shards (0.tar, 1.tar, …) of this split")
    return paths


def _label(data: bytes, classes: int, where: str) -> int:
    text = data.decode(errors="replace").strip()
    if not _NUMBER.fullmatch(text) or (classes and int(text) >= classes):
        below = f" below {classes}" if classes else ""
        raise IntegrityError(f"{where}: label {text[:20]!r} is not a class id{below}")
    return int(text)
