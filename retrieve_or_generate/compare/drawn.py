"""What a trial draws from the image sets of its task: so many images of each class of one set, or of two that are mixed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from retrieve_or_generate.curate.balance import class_quotas
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.settings import MixSettings
from retrieve_or_generate.tasks import Task

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, lie evenly however many are taken


@dataclass(frozen=True)
class Drawn:
    """The image sets of one task that its trials draw from, by source."""

    task: Task
    sets: Mapping[str, ImageSet]

    def __post_init__(self) -> None:
        """`UsageError` for a set of other classes, whose labels would be taken for the task's."""
        for image_set in self.sets.values():
            if image_set.class_names != tuple(self.task.class_names):
                theirs, ours = len(image_set.class_names), len(self.task.class_names)
                raise UsageError(
                    f"{image_set.folder}: its {theirs} classes are not the {ours} of task {self.task.name!r}; give the task that "
                    "it was made for, or make it anew"
                )

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Images of each class, (classes,) int64, by source."""
        return {source: image_set.counts() for source, image_set in self.sets.items()}

    @cached_property
    def excluded(self) -> list[str]:
        """The classes that one source leaves out, and therefore all, in the task's order."""
        names = {name for image_set in self.sets.values() for name in image_set.excluded}
        return sorted(names, key=self.task.class_names.index)

    def quotas(self, scale: int) -> np.ndarray:
        """Images of each class that every source gives at this scale; `UsageError` names a class that is too small."""
        return class_quotas(self.counts, scale, self.task.class_names, self.excluded)

    def alone(self, source: str, quotas: np.ndarray) -> dict[str, Any]:
        """What a trial of one source follows from."""
        return self._left_out() | {"image_set": manifest_of(self.sets[source]), "quotas": quotas.tolist()}

    def mixed(self, mix: MixSettings, quotas: np.ndarray) -> dict[str, Any]:
        """What a trial of two sources follows from; `quotas` are those of a single one."""
        counts = {source: self.counts[source] for source in mix.of}
        parts = mixed_quotas(mix, quotas, counts, self.task.class_names, self.excluded)
        return self._left_out() | {
            "mix": mix.model_dump(mode="json"),
            "image_sets": {source: manifest_of(self.sets[source]) for source in mix.of},
            "parts": {source: part.tolist() for source, part in parts.items()},
            "quotas": np.sum(list(parts.values()), axis=0).tolist(),
        }

    def _left_out(self) -> dict[str, Any]:
        return {"excluded": self.excluded} if self.excluded else {}


def manifest_of(image_set: ImageSet) -> str:
    """The sha256 of its table of contents, which names every image."""
    return str(image_set.record["files"]["manifest.parquet"]["sha256"])


def mixed_quotas(
    mix: MixSettings,
    quotas: np.ndarray,
    counts: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    excluded: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Images of each class from each of the two sources, (classes,) int64 each.

    `quotas` are those of every other source at this scale: by share each class's are divided, so the mixture is as large and as
    even as they are. What rounding leaves goes to the first source in some classes and to the second in others, in such turns that
    any run of classes comes out at the share. Larger scales hold smaller ones.

    Raises:
        UsageError: a count that a source does not have.
    """
    first, second = mix.of
    if mix.counts is None:
        ours = np.floor(mix.first_share * quotas + (np.arange(len(quotas)) + 0.5) * _GOLDEN % 1).astype(np.int64)
        return {first: ours, second: quotas - ours}
    return {
        source: quotas if count is None else class_quotas({source: counts[source]}, count, class_names, excluded)
        for source, count in zip(mix.of, mix.counts, strict=True)
    }
