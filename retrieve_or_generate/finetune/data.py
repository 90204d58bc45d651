"""What a trial is trained and measured on, decoded once and held as bytes per pixel: trials that share a task share these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune.decoded import KEPT_FROM_BYTES, SetImages, decoded
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.models import ImageModel
from retrieve_or_generate.pixels import Framing
from retrieve_or_generate.store import content_key
from retrieve_or_generate.tasks.base import Split, SplitName, Task
from retrieve_or_generate.tasks.digests import split_digest
from retrieve_or_generate.tasks.templates import as_functions


class Chosen:
    """Rows of an array that stays where it lies, as one that is mapped into memory: they are read when they are asked for."""

    def __init__(self, of: np.ndarray, rows: np.ndarray):
        self.of, self.rows = of, rows
        self.shape, self.dtype, self.ndim = (len(rows), *of.shape[1:]), of.dtype, of.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """An array of one or more axes less or of the same, as numpy gives it for the rows alone."""
        return np.asarray(self.of[self.rows[rows]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.of[self.rows], dtype)


class Joined:
    """Several arrays of images, one after another, that stay where they lie."""

    def __init__(self, parts: Sequence[Pixels]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, ...] = (int(self.ends[-1]), *parts[0].shape[1:])
        self.dtype: np.dtype[Any] = parts[0].dtype
        self.ndim: int = parts[0].ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The images at a slice or an array of rows."""
        wanted = np.arange(len(self))[rows]
        images, of_part = (
            np.empty((len(wanted), *self.shape[1:]), self.dtype),
            np.searchsorted(self.ends, wanted, "right"),
        )
        for place, part in enumerate(self.parts):
            mine = of_part == place
            images[mine] = part[wanted[mine] - (self.ends[place] - len(part))]
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


Pixels = np.ndarray | Chosen | Joined
"""(n, 3, s, s) uint8, in memory or mapped into it."""


def chosen(pixels: np.ndarray, rows: np.ndarray) -> np.ndarray | Chosen:
    """The images at these rows; of an array that is mapped into memory nothing is read."""
    return Chosen(pixels, rows) if isinstance(pixels, np.memmap) else pixels[rows]


def together(parts: Sequence[Pixels]) -> Pixels:
    """One array after another; where one is mapped into memory nothing is read."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    return np.concatenate(arrays) if len(arrays) == len(parts) else Joined(parts)


@dataclass(frozen=True)
class LabelledImages:
    """`images` (n, 3, s, s) uint8 and their `labels` (n,) int64; `keys` name them where predictions are stored."""

    images: Pixels
    labels: np.ndarray
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or self.labels.shape != self.images.shape[:1]:
            given = f"{self.images.dtype} {self.images.shape} and labels {self.labels.shape}"
            raise UsageError(f"images must be uint8 (n, 3, size, size) with (n,) labels, not {given}")
        if self.keys and len(self.keys) != len(self.labels):
            raise UsageError(f"{len(self.keys)} keys for {len(self.labels)} images")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskImages:
    """A task as trials see it: three splits, shifted test sets, and `class_weights` (d, k) of unit columns, CLIP's own zero-shot
    classifier.
    """

    class_weights: Tensor
    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    shifts: Mapping[str, LabelledImages] = field(default_factory=dict, kw_only=True)
    class_names: tuple[str, ...] = field(default=(), kw_only=True)
    templates: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def n_classes(self) -> int:
        return self.class_weights.shape[1]


def task_images(task: Task, clip: ImageModel, framing: Framing = "square") -> TaskImages:
    """Decode the splits and shifts of `task` at the size of `clip` and make its classifier."""
    splits = {name: _decoded(task.split(name), clip.image_size, framing) for name in get_args(SplitName)}
    shifts = {name: _decoded(task.shift(name), clip.image_size, framing) for name in task.shifts}
    weights = clip.class_weights(task.class_names, as_functions(task.templates))
    return TaskImages(weights, **splits, shifts=shifts, class_names=task.class_names, templates=task.templates)


def _decoded(split: Split, size: int, framing: Framing) -> LabelledImages:
    pixels = decoded(split, lambda: split_digest(split), size, framing)
    return LabelledImages(pixels, split.labels, tuple(split.keys))


@dataclass(frozen=True)
class DecodedSet:
    """Images of a set with their `pixels` (n, 3, s, s) uint8, in the order of `keys`."""

    image_set: ImageSet
    keys: pd.Index
    pixels: np.ndarray

    def drawn(self, keys: Sequence[str]) -> LabelledImages:
        """Those with these keys, in their order."""
        rows = self.keys.get_indexer(pd.Index(keys))
        labels = self.image_set.kept.set_index("key")["label"].loc[list(keys)].to_numpy(np.int64)
        return LabelledImages(chosen(self.pixels, rows), labels, tuple(keys))


def decoded_set(
    image_set: ImageSet, size: int, framing: Framing = "square", keys: Sequence[str] | None = None
) -> DecodedSet:
    """The set decoded at this size: of `keys`, where they are few, those alone, else all of it, for other trials to share.

    Raises:
        IntegrityError: an image that is not there, or no picture. UsageError: no room in the cache folder.
    """
    taken = image_set.kept.set_index("key")
    if keys is not None and len(keys) * 3 * size**2 < KEPT_FROM_BYTES:
        taken = taken.loc[list(keys)]
    names = taken.index.tolist()
    split = Split(names, SetImages(image_set, names), taken["label"].to_numpy(), str(image_set.folder), advice="")
    pixels = decoded(split, lambda: content_key(taken["sha256"].tolist()), size, framing)
    return DecodedSet(image_set, taken.index, pixels)
