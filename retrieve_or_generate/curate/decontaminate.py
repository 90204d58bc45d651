"""Copies of a task's validation and test images among the candidates: what is trained on must not be what is tested on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from retrieve_or_generate.curate.descriptor import Thumbnails, copies, describe
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.tasks.base import Task


@dataclass(frozen=True)
class EvaluationImages:
    """The images that no training image may copy. `keys` are `SPLIT/KEY`."""

    keys: tuple[str, ...]
    sha256: np.ndarray
    thumbnails: Thumbnails


def evaluation_images(task: Task, size: int) -> EvaluationImages:
    """Validation and test images of `task`, brought to `size` as the candidates are."""
    splits = {name: task.split(name) for name in ("val", "test")}
    keys = tuple(f"{name}/{key}" for name, split in splits.items() for key in split.keys)
    images = [image for split in splits.values() for image in split.images]
    sha256 = np.array([hashlib.sha256(image).hexdigest() for image in images])
    return EvaluationImages(keys, sha256, describe(decode_all(images, size)))


def contaminated(sha256: np.ndarray, thumbnails: Thumbnails, evaluation: EvaluationImages) -> dict[int, str]:
    """Candidates that copy an evaluation image: row to the image's key, the first where there are several."""
    i, j = copies(thumbnails, evaluation.thumbnails)
    by_hash = {digest: row for row, digest in reversed(list(enumerate(evaluation.sha256)))}
    found: dict[int, str] = {}
    for row, other in zip(i.tolist(), j.tolist(), strict=True):
        found.setdefault(row, evaluation.keys[other])
    for row, digest in enumerate(sha256):
        if digest in by_hash:
            found[row] = evaluation.keys[by_hash[digest]]
    return found
