"""What the pocket world's models learn from: the pool that this package draws, without the planted evaluation copies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from retrieve_or_generate.pocket.pictures import decode, pool_rows

# How often a picture is drawn, by its task: the digits are hardest, the things are there for their words.
_DRAWN = {"digits": 2.0, "textures": 1.5, "aircraft": 1.0, None: 0.2}


@dataclass(frozen=True)
class TrainingPool:
    """The pool without the planted evaluation copies: (n, 32, 32, 3) uint8 images, captions, sampling weights (n,)."""

    images: np.ndarray
    captions: list[str]
    weights: np.ndarray


def training_pool() -> TrainingPool:
    rows = [row for row in pool_rows() if row.planted["kind"] != "evaluation_copy"]
    named = [(row.planted.get("task"), row.planted["class_name"]) for row in rows]
    counts = Counter(named)
    tasks = Counter(task for task, _ in counts)
    sizes = Counter(task for task, _ in named)
    weights = [
        _DRAWN[task] * (sizes[task] / tasks[task] / counts[task, name]) ** 0.5  # tail classes drawn a little more often
        for task, name in named
    ]
    return TrainingPool(np.stack([decode(row.jpeg) for row in rows]), [row.caption for row in rows], np.array(weights))
