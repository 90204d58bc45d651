"""What a trial is trained and measured on, decoded once and held as bytes per pixel: trials that share a task share these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models import ImageModel
from retrieve_or_generate.tasks.base import Split, SplitName, Task
from retrieve_or_generate.tasks.templates import as_functions


@dataclass(frozen=True)
class LabelledImages:
    """`images` (n, 3, s, s) uint8 and their `labels` (n,) int64; `keys` name them where predictions are stored."""

    images: np.ndarray
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


def task_images(task: Task, clip: ImageModel) -> TaskImages:
    """Decode the splits and shifts of `task` at the size of `clip` and make its classifier."""
    splits = {name: _decoded(task.split(name), clip.image_size) for name in get_args(SplitName)}
    shifts = {name: _decoded(task.shift(name), clip.image_size) for name in task.shifts}
    weights = clip.class_weights(task.class_names, as_functions(task.templates))
    return TaskImages(weights, **splits, shifts=shifts, class_names=task.class_names, templates=task.templates)


def _decoded(split: Split, size: int) -> LabelledImages:
    return LabelledImages(split.decoded(size), split.labels, tuple(split.keys))
