"""How many images of each class: the cap and the floor, the order within a class, and the quotas that all sources share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from retrieve_or_generate.curate.score import places
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.seeds import seed_for


def within_cap(scores: np.ndarray, labels: np.ndarray, keys: np.ndarray, class_cap: int) -> np.ndarray:
    """Which images are among the `class_cap` best of their class, (n,) bool."""
    return np.asarray(places(scores, labels, keys) < class_cap)


def short_classes(labels: np.ndarray, classes: int, least_per_class: int) -> np.ndarray:
    """The classes with fewer than `least_per_class` of the kept images, whose `labels` these are: (m,) int64, ascending."""
    return np.flatnonzero(np.bincount(labels, minlength=classes) < least_per_class)


def seeded_ranks(task: str, labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Ranks 0..n_c-1 within each class, (n,) int64, in a random order that depends on task and keys alone, not on scores.

    An image keeps its place among the others when images come or go.
    """
    draws = np.array([seed_for("image set", "rank", task, str(key)) for key in keys], dtype=np.int64)
    return places(-draws, labels, keys)


def class_quotas(
    counts: Mapping[str, np.ndarray], scale: int, class_names: Sequence[str], excluded: Collection[str] = ()
) -> np.ndarray:
    """Images of each class in a training set of `scale` images, (classes,) int64, the same for every source.

    `counts` gives each source's images by class; a class that is `excluded` by one source gets none from any. The classes are
    filled evenly, one image each in turn, a class standing aside once the source that has fewest of it is used up; so a smaller
    scale never takes more of a class than a larger one.

    Raises:
        UsageError: the sources do not share `scale` images; it names the class and the source that give least.
    """
    names = list(counts)
    included = np.array([name not in excluded for name in class_names])
    available = np.where(included, np.min([counts[name] for name in names], axis=0), 0).astype(np.int64)
    if scale > available.sum():
        least = int(np.where(included, available, np.iinfo(np.int64).max).argmin())
        source = min(names, key=lambda name: int(counts[name][least]))
        without = f"; left out: {', '.join(sorted(excluded))}" if excluded else ""
        raise UsageError(
            f"scale {scale}: class by class the sources {', '.join(names)} share only {available.sum()} images (fewest of "
            f"{class_names[least]!r}: {available[least]} in {source}{without}); take a smaller scale, more candidates or a larger "
            "curate.keep_fraction"
        )
    level = _water_level(available, scale)
    quotas = np.minimum(available, level)
    open_classes = np.flatnonzero(available > level)
    quotas[open_classes[: scale - quotas.sum()]] += 1
    return quotas


def _water_level(available: np.ndarray, scale: int) -> int:
    """The most images that every class can give, where it has them, without passing `scale` in all."""
    low, high = 0, int(available.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(available, middle).sum() <= scale else (low, middle - 1)
    return low
