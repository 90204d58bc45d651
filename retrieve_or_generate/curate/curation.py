"""Curation: what every source's candidates go through alike, whatever they are and wherever they came from.

Reads `candidates.parquet` and the shards of an image set folder; writes `manifest.parquet` and, last, `image_set.json`. In
turn: copies of evaluation images go, then copies within the set, then all but the best-scored share of each class, then what
is over the cap; what is left is ranked. Candidates are looked at in order of key, so the order they came in changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieve_or_generate.curate import descriptor
from retrieve_or_generate.curate.balance import seeded_ranks, within_cap
from retrieve_or_generate.curate.decontaminate import EvaluationImages, contaminated, evaluation_images
from retrieve_or_generate.curate.deduplicate import duplicates
from retrieve_or_generate.curate.descriptor import Thumbnails
from retrieve_or_generate.curate.score import clip_scores, top_fraction
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import CurateSettings
from retrieve_or_generate.image_set import (
    CANDIDATES,
    MANIFEST,
    SEAL,
    ImageSet,
    ShardReader,
    candidates_record,
    load_image_set,
    read_table,
    seal_image_set,
)
from retrieve_or_generate.models import Clip, image_features
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.tasks.base import Task

__all__ = ["Described", "curate", "decide"]

_BATCH = 256


@dataclass(frozen=True)
class Described:
    """What curation looks at, a row for each candidate that has an image, sorted by key. `features` are of unit length."""

    keys: np.ndarray
    labels: np.ndarray
    sha256: np.ndarray
    features: np.ndarray
    thumbnails: Thumbnails
    scores: np.ndarray

    def take(self, rows: np.ndarray) -> Described:
        return Described(
            self.keys[rows],
            self.labels[rows],
            self.sha256[rows],
            self.features[rows],
            self.thumbnails.take(rows),
            self.scores[rows],
        )


def decide(
    described: Described, evaluation: EvaluationImages | None, settings: CurateSettings
) -> tuple[np.ndarray, dict[int, str]]:
    """Why each row is dropped, (n,) of str, "" for those that stay; and which evaluation image a contaminated row copies."""
    reasons = np.full(len(described.keys), "", dtype="<U16")
    copied = {} if evaluation is None else contaminated(described.sha256, described.thumbnails, evaluation)
    reasons[list(copied)] = "contaminated"
    if settings.deduplicate:
        rows, left = _left(described, reasons)
        surplus = duplicates(
            left.sha256, left.features, left.thumbnails, left.scores, left.keys, settings.duplicate_cosine
        )
        reasons[rows[surplus]] = "duplicate"
    rows, left = _left(described, reasons)
    reasons[rows[~top_fraction(left.scores, left.labels, left.keys, settings.keep_fraction)]] = "clip_score"
    rows, left = _left(described, reasons)
    reasons[rows[~within_cap(left.scores, left.labels, left.keys, settings.class_cap)]] = "class_cap"
    return reasons, copied


def _left(described: Described, reasons: np.ndarray) -> tuple[np.ndarray, Described]:
    rows = np.flatnonzero(reasons == "")
    return rows, described.take(rows)


def _describe(folder: Path, table: pa.Table, clip: Clip, class_weights: np.ndarray) -> Described:
    """Decode every image of `table` once, in batches; nothing but features and thumbnails is held."""
    places = list(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
    labels = table["label"].to_numpy()
    reader = ShardReader(folder)
    features = [np.zeros((0, clip.embed_dim), np.float32)]
    thumbnails = [descriptor.describe(decode_all([], clip.image_size))]
    for start in range(0, len(places), _BATCH):
        pixels = decode_all(reader.read(places[start : start + _BATCH]), clip.image_size)
        features.append(image_features(clip, pixels, batch_size=_BATCH))
        thumbnails.append(descriptor.describe(pixels))
    stacked = np.concatenate(features)
    return Described(
        np.array([key for _, key in places], dtype=np.str_),
        labels,
        np.array(table["sha256"].to_pylist(), dtype=np.str_),
        stacked,
        descriptor.stack(thumbnails),
        clip_scores(stacked, class_weights, labels),
    )


def _manifest(table: pa.Table, described: Described, reasons: np.ndarray, ranks: np.ndarray) -> pa.Table:
    """The candidates' table with what was decided, rows in their old order."""
    rows = pc.index_in(pa.array(described.keys.tolist(), pa.string()), table["key"].combine_chunks()).to_numpy()
    scores = np.full(len(table), np.nan, np.float32)
    rank = np.full(len(table), -1, np.int64)
    reason = np.array(table["reason"].to_pylist(), dtype=object)
    scores[rows], rank[rows], reason[rows] = described.scores, ranks, reasons
    status = np.where(reason == "", "kept", "dropped")
    decided = {"clip_score": scores, "status": status.tolist(), "reason": reason.tolist(), "rank": rank}
    columns = {name: pa.array(decided[name]) if name in decided else table[name] for name in MANIFEST.names}
    return pa.table(columns).cast(MANIFEST)


def _open_candidates(folder: Path, task: Task) -> pa.Table:
    record = candidates_record(folder)
    if record is None:
        raise UsageError(f"{folder}: no finished candidates; run the command that makes this image set again")
    if record["task"] != task.name or record["class_names"] != list(task.class_names):
        raise UsageError(f"{folder}: candidates for task {record['task']!r}, not for {task.name!r} with these classes")
    return read_table(folder / CANDIDATES)


def _finished(folder: Path, task: Task, curation: dict[str, Any]) -> ImageSet | None:
    if not (folder / SEAL).exists():
        return None
    image_set = load_image_set(folder, task.name)
    return image_set if image_set.record["curation"] == curation else None


def curate(folder: Path, *, task: Task, clip: Clip, settings: CurateSettings) -> ImageSet:
    """Decide on every candidate in `folder`, seal the image set, and open it.

    A set that was curated so before is opened as it is. Raises `UsageError` for candidates that are unfinished or another
    task's, `IntegrityError` for a file that changed.
    """
    curation = {"settings": settings.model_dump(mode="json"), "clip": clip.fingerprint, "task": task.fingerprint}
    curation["descriptor"] = descriptor.NAME
    if (image_set := _finished(folder, task, curation)) is not None:
        return image_set
    table = _open_candidates(folder, task)
    (folder / SEAL).unlink(missing_ok=True)
    with_image = table.filter(pc.equal(table["reason"], "")).sort_by("key")
    class_weights = clip.class_weights(task.class_names, task.templates).cpu().numpy()
    described = _describe(folder, with_image, clip, class_weights)
    evaluation = evaluation_images(task, clip.image_size) if settings.decontaminate else None
    reasons, copied = decide(described, evaluation, settings)
    ranks = np.full(len(reasons), -1, np.int64)
    rows, kept = _left(described, reasons)
    ranks[rows] = seeded_ranks(task.name, kept.labels, kept.keys)
    evaluation_copies = {str(described.keys[row]): key for row, key in sorted(copied.items())}
    manifest = _manifest(table, described, reasons, ranks)
    seal_image_set(folder, manifest, curation=curation, evaluation_copies=evaluation_copies)
    return load_image_set(folder, task.name, verify=False)
