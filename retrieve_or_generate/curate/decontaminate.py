"""Copies of a task's own images among the candidates: what is trained on must not be what is tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from retrieve_or_generate.curate.kinds import ArrayCache, Kind, describe
from retrieve_or_generate.curate.near import Comparison, copies
from retrieve_or_generate.store import cache_folder
from retrieve_or_generate.tasks.base import Split, SplitName, Task


@dataclass(frozen=True)
class EvaluationImages:
    """The images that no training image may copy. `keys` are `SPLIT/KEY` or `SHIFT/KEY`, `descriptors` (n, d)."""

    keys: tuple[str, ...]
    sha256: np.ndarray
    descriptors: np.ndarray


def evaluation_images(task: Task, splits: Sequence[SplitName], kind: Kind) -> EvaluationImages:
    """The images of these splits of `task`, described as the candidates are; descriptors are kept in the cache folder.

    Shifted test sets are test images like the task's own: they count wherever `test` does.

    Raises `IntegrityError` naming an image that cannot be decoded.
    """
    cache = ArrayCache(cache_folder() / "descriptors")
    shown = {name: task.split(name) for name in splits} | {
        name: task.shift(name) for name in shifts_beside(task, splits)
    }
    described = [_described(task, name, split, kind, cache) for name, split in shown.items()]
    return EvaluationImages(
        tuple(key for one in described for key in one.keys),
        np.concatenate([one.sha256 for one in described]),
        np.concatenate([one.descriptors for one in described]),
    )


def shifts_beside(task: Task, splits: Sequence[SplitName]) -> tuple[str, ...]:
    """Names of the shifted test sets that no image may copy where none may copy these splits."""
    return tuple(task.shifts) if "test" in splits else ()


def _described(task: Task, name: str, split: Split, kind: Kind, cache: ArrayCache) -> EvaluationImages:
    keys = tuple(f"{name}/{key}" for key in split.keys)
    sha256 = [hashlib.sha256(image).hexdigest() for image in split.images]
    named = [f"{task.folder}: {key}" for key in keys]
    (descriptors,) = describe([kind], sha256, named, lambda start, stop: split.images[start:stop], cache)
    return EvaluationImages(keys, np.array(sha256, dtype=np.str_), descriptors)


def contaminated(
    sha256: np.ndarray, evaluation: EvaluationImages, comparison: Comparison, device: torch.device | str = "cpu"
) -> dict[int, str]:
    """Candidates that copy an evaluation image, by equal bytes or by `comparison` (candidates on its left, evaluation images on its
    right): row to the image's key, the first where there are several.
    """
    by_hash = {digest: row for row, digest in reversed(list(enumerate(evaluation.sha256)))}
    found: dict[int, str] = {}
    for row, other in zip(*(side.tolist() for side in copies(comparison, device)), strict=True):
        found.setdefault(row, evaluation.keys[other])
    for row, digest in enumerate(sha256):
        if digest in by_hash:
            found[row] = evaluation.keys[by_hash[digest]]
    return found
