"""What a layout of files offers, and how its labels become those of a task.

A layout lists the images of a split with labels as they stand there: names of folders, words or numbers. Class ids come from names
by a table of the task, never from an order of folders: an empty folder would shift every later label.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.tasks.split import Reader, Split


@dataclass(frozen=True)
class Listing:
    """The images of a split as they lie there. Image i has the label `names[codes[i]]`; `names` may hold some that no image has."""

    keys: Sequence[str]
    images: Sequence[bytes]
    codes: np.ndarray
    names: Sequence[str]


class Layout(Protocol):
    """`where` is what messages call it. `every_class`: each class has a place in each split, so one without images is a mistake."""

    @property
    def every_class(self) -> bool: ...
    @property
    def where(self) -> str: ...
    def splits(self) -> list[str]:
        """What can be read."""

    def labels(self, split: str) -> Sequence[str]:
        """The labels that stand in a split, in the layout's order."""

    def listing(self, split: str) -> Listing:
        """The images of a split that is there; a `UsageError` names what is missing or damaged."""


@dataclass(frozen=True)
class Labelled:
    """A split of a layout as a task sees it. `ids` are class ids by label; of several labels of a class the last is its name.

    A shift may lack classes, and its images of labels without an id are left out.
    """

    layout: Layout
    split: str
    ids: Mapping[str, int]
    is_shift: bool = False

    def read(self) -> Split:
        return self._read

    @cached_property
    def _read(self) -> Split:
        where = f"{self.layout.where}/{self.split}"
        listed = self.layout.listing(self.split)
        table = np.array([self.ids.get(name, -1) for name in listed.names] or [-1], np.int64)
        labels = table[listed.codes]
        split = Split(listed.keys, listed.images, labels, where)
        if unknown := np.flatnonzero(labels < 0).tolist():
            if not self.is_shift:
                raise self._unknown(f"{where}: {listed.keys[unknown[0]]}", listed.names[listed.codes[unknown[0]]])
            split = split.take(np.flatnonzero(labels >= 0))
        if not len(split):
            raise UsageError(f"{where}: no image of any class of the task")
        if nameless := next((key for key in split.keys if not _is_name(key)), None):
            raise IntegrityError(f"{where}: {nameless!r} is no file name in UTF-8; rename the file")
        if len(set(split.keys)) < len(split):
            twice = Counter(split.keys).most_common(1)[0][0]
            raise IntegrityError(f"{where}: {twice} stands there twice; leave one of them out")
        self._check_classes(split, where)
        return split

    def _unknown(self, image: str, label: str) -> UsageError:
        if label.removeprefix("-").isdigit():
            return IntegrityError(f"{image}: label {label} is not a class id below {len(set(self.ids.values()))}")
        return IntegrityError(f"{image}: {unknown_name('class', label, self.ids)}")

    def _check_classes(self, split: Split, where: str) -> None:
        if not self.layout.every_class or self.is_shift:
            return
        there = set(np.unique(split.labels).tolist())
        named = {place: label for label, place in self.ids.items()}
        missing = [named[place] for place in sorted(named) if place not in there]
        if missing:
            more = f", nor of {len(missing) - 1} more" if missing[1:] else ""
            raise UsageError(
                f"{where}: no image (JPEG, PNG or WebP) of class {missing[0]!r}{more}; a folder of it belongs there"
            )


def _is_name(name: str) -> bool:
    """Whether what a table holds can name a file, and the name of a file, whose bytes may be anything, can stand in a table."""
    return "\0" not in name and (name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name))


@dataclass(frozen=True)
class HeldOut:
    """A part of another split, drawn at random as torch's `random_split` with seed 42 does, in the order of that split.

    `shares` are the parts in which it is cut after the first, as fractions of it or as numbers of images; the first has the rest.
    """

    of: Reader
    shares: tuple[float, ...]
    part: int

    def read(self) -> Split:
        split = self.of.read()
        return split.take(held_out(len(split), self.shares, split.where)[self.part])


def held_out(images: int, shares: Sequence[float], where: str) -> list[np.ndarray]:
    """Rows of each part, ascending; `UsageError` where the parts leave nothing, or one of them is empty."""
    import torch

    counted = all(isinstance(share, int) for share in shares)
    if not counted and any(isinstance(share, int) for share in shares):
        raise UsageError(f"{where}: hold out shares, such as 0.2, or numbers of images, not one of each")
    lengths = [(images if counted else 1) - sum(shares), *shares]
    if lengths[0] <= 0:
        raise UsageError(f"{where}: {sum(shares):g} of {images} images cannot be held out; hold out fewer")
    while not counted and sum(lengths) > 1:  # by a rounding; torch would take them for numbers of images
        lengths[0] = math.nextafter(lengths[0], 0)
    seed = torch.Generator().manual_seed(42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty part, which is an error here
        parts: list[Any] = torch.utils.data.random_split(range(images), lengths, seed)  # type: ignore[arg-type]
    if empty := [part for part in parts if not len(part)]:
        raise UsageError(f"{where}: {images} images are too few for {len(parts)} parts, {len(empty)} of them empty")
    return [np.sort(np.array(part.indices, np.int64)) for part in parts]
