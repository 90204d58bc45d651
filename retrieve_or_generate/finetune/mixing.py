"""Training on two sources at once: one set of both, or batches of equal halves whose losses are weighed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune import recipe
from retrieve_or_generate.finetune.data import LabelledImages, together
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings


@dataclass(frozen=True)
class MixedImages(LabelledImages):
    """The loss is `gamma` · L(the `first` so many images) + (1 − `gamma`) · L(the others), with half of every batch from each."""

    first: int = 0
    gamma: float = 0.5


def joined(*parts: LabelledImages, gamma: float | None = None) -> LabelledImages:
    """One training set of all parts, in their order; with `gamma`, of two whose losses are weighed."""
    if len(parts) == 1:
        return parts[0]
    images = together([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    keys = tuple(key for part in parts for key in part.keys)
    if gamma is None:
        return LabelledImages(images, labels, keys)
    return MixedImages(images, labels, keys, len(parts[0]), gamma)


def batches_of(
    train: LabelledImages, settings: FinetuneSettings, seed: int
) -> tuple[Iterator[np.ndarray], Tensor | None]:
    """Row numbers of one batch after another, without end, and what each row's loss counts in it; None: all count the same.

    Halves of a mixture are always full, each in an order of its own: all of a source's images once before any comes again.

    Raises:
        UsageError: a batch that has no two halves, or a mixture that has only one part.
    """
    if not isinstance(train, MixedImages):
        return recipe.batches(settings, len(train), seed), None
    sizes = math.ceil(settings.batch_size / 2), settings.batch_size // 2
    counts = train.first, len(train) - train.first
    if not all(sizes) or not all(counts):
        raise UsageError(
            f"a mixture weighed by gamma needs images of both sources, and finetune.batch_size of 2 or more, not {counts[0]} and "
            f"{counts[1]} images in batches of {settings.batch_size}"
        )
    seeds = seed, seed_for("finetune", "second half", seed)
    first, second = (
        recipe.batches(settings.model_copy(update={"recipe": "equal_updates", "batch_size": size}), count, one)
        for size, count, one in zip(sizes, counts, seeds, strict=True)
    )
    weights = torch.tensor([train.gamma / sizes[0]] * sizes[0] + [(1 - train.gamma) / sizes[1]] * sizes[1])
    return (np.concatenate([a, train.first + b]) for a, b in zip(first, second, strict=False)), weights
