"""Curation: what every source's candidates go through alike, whatever they are and wherever they came from.

Reads `candidates.parquet` and the shards of an image set folder; writes `manifest.parquet` and, last, `image_set.json`. In
turn: copies of the task's own images go, then copies within the set, then all but the best-scored share of each class, then what
is over the cap, then what is left of a class that is too small; the rest is ranked. What a source asks besides (`steps.py`) has its
place in between. Candidates are looked at in order of key, so the order they came in changes nothing. What was computed of the
images stays in `.described/` and is used again while it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieve_or_generate.curate import perceptual
from retrieve_or_generate.curate.balance import seeded_ranks, short_classes, within_cap
from retrieve_or_generate.curate.decontaminate import (
    EvaluationImages,
    contaminated,
    evaluation_images,
    shifts_beside,
)
from retrieve_or_generate.curate.deduplicate import duplicates
from retrieve_or_generate.curate.described import Described
from retrieve_or_generate.curate.descriptor import Descriptor, find_descriptor
from retrieve_or_generate.curate.kinds import ArrayCache, Kind, View, describe
from retrieve_or_generate.curate.score import best_template_scores, clip_scores, top_fraction
from retrieve_or_generate.curate.steps import Seen, Step, When, run_steps
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import (
    CANDIDATES,
    MANIFEST,
    MANIFEST_TABLE,
    SEAL,
    ImageSet,
    ShardReader,
    candidates_record,
    load_image_set,
    read_table,
    seal_image_set,
    write_table,
)
from retrieve_or_generate.models import Clip, image_features, text_features
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.tasks.base import Task
from retrieve_or_generate.tasks.templates import as_functions, filled

__all__ = ["Described", "Looked", "curate", "curation_record", "decide", "look"]

Progress = Callable[[int, int], None]
CACHE = ".described"
_BATCH = 256
_SHOWN = 3  # classes that a message names


def curate(
    folder: Path,
    *,
    task: Task,
    clip: Clip,
    settings: CurateSettings,
    excluded: Collection[str] = (),
    steps: Sequence[Step] = (),
    progress: Progress | None = None,
    looked: Looked | None = None,
) -> ImageSet:
    """Decide on every candidate in `folder`, seal the image set, and open it.

    A set that was curated so before is opened as it is. Classes that are `excluded`, because the set that this one is made after
    excludes them, are left out here too. `steps` are what the source decides on its own images besides. `progress` is called with
    images looked at and images in all. `looked` is what `look` gave for just these candidates, which is not done again.

    Raises:
        UsageError: candidates that are unfinished or another task's, a descriptor without weights, or a class that is too small.
        IntegrityError: a file changed.
    """
    curation = curation_record(task, clip, settings, steps)
    if (image_set := _finished(folder, task, curation)) is not None:
        return image_set
    if looked is None:
        table = _open_candidates(folder, task)
        looked = look(folder, table, task=task, clip=clip, settings=settings, steps=steps, progress=progress)
    (folder / SEAL).unlink(missing_ok=True)
    described, seen, told, reasons = looked.described, looked.seen, dict(looked.told), looked.reasons.copy()

    def besides(when: When, reasons: np.ndarray) -> None:
        told.update(run_steps(steps, when, described, reasons, seen))

    choose(described, reasons, settings, besides)
    left_out = _leave_out(folder, task, looked.table, described, reasons, settings, excluded)
    besides("last", reasons)
    seen.cache.keep_used()
    ranks = np.full(len(reasons), -1, np.int64)
    rows, kept = _left(described, reasons)
    ranks[rows] = seeded_ranks(task.name, kept.labels, kept.keys)
    evaluation_copies = {str(described.keys[row]): key for row, key in sorted(looked.copied.items())}
    manifest = _manifest(looked.table, described, reasons, ranks)
    seal_image_set(folder, manifest, curation=curation, evaluation_copies=evaluation_copies, excluded=left_out, **told)
    return load_image_set(folder, task.name, verify=False)


@dataclass(frozen=True)
class Looked:
    """What was seen of candidates, and why some are not fit to come to the filter.

    `described` has a row for each candidate of `table` with an image, `reasons` too (n,), "" for those that are fit; `copied` says
    which evaluation image a contaminated row copies, `told` what a source's own steps found.
    """

    table: pa.Table
    described: Described
    seen: Seen
    reasons: np.ndarray
    copied: dict[int, str]
    told: dict[str, dict[str, Any]]

    @property
    def fit(self) -> Described:
        return _left(self.described, self.reasons)[1]


def look(
    folder: Path,
    table: pa.Table,
    *,
    task: Task,
    clip: Clip,
    settings: CurateSettings,
    steps: Sequence[Step] = (),
    progress: Progress | None = None,
) -> Looked:
    """Look at the images of the candidates in `table`, whose shards lie in `folder`, sealed or not. Parameters as for `curate`."""
    descriptor = find_descriptor(settings)
    kind = descriptor.kind(clip.image_size, clip.device)
    with_image = table.filter(pc.equal(table["reason"], "")).sort_by("key")
    seen = Seen(clip, kind, _reader(folder, with_image), ArrayCache(folder / CACHE))
    described = _describe(folder, with_image, task, seen, settings, progress)
    evaluation = evaluation_images(task, settings.decontaminate_against, kind) if settings.decontaminate else None
    told: dict[str, dict[str, Any]] = {}

    def besides(when: When, reasons: np.ndarray) -> None:
        told.update(run_steps(steps, when, described, reasons, seen))

    reasons, copied = unfit(described, evaluation, settings, descriptor, str(clip.device), besides)
    return Looked(table, described, seen, reasons, copied, told)


Besides = Callable[[When, np.ndarray], None]
"""Called with the reasons so far where a source's own steps stand; it adds to them."""


def decide(
    described: Described,
    evaluation: EvaluationImages | None,
    settings: CurateSettings,
    descriptor: Descriptor,
    device: str = "cpu",
    besides: Besides = lambda when, reasons: None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Why each row is dropped, (n,) of str, "" for those that stay; and which evaluation image a contaminated row copies.

    Only a class that is too small is not known here yet (`short_classes`).
    """
    reasons, copied = unfit(described, evaluation, settings, descriptor, device, besides)
    choose(described, reasons, settings, besides)
    return reasons, copied


def unfit(
    described: Described,
    evaluation: EvaluationImages | None,
    settings: CurateSettings,
    descriptor: Descriptor,
    device: str,
    besides: Besides,
) -> tuple[np.ndarray, dict[int, str]]:
    """The first half of `decide`: copies, of the task's images and of each other."""
    reasons = np.full(len(described.keys), "", dtype="<U16")
    copied: dict[int, str] = {}
    if evaluation is not None:
        comparison = descriptor.comparison(described.descriptors, evaluation.descriptors)
        copied = contaminated(described.sha256, evaluation, comparison, device)
    reasons[list(copied)] = "contaminated"
    besides("first", reasons)
    if settings.deduplicate:
        rows, left = _left(described, reasons)
        comparing = partial(left.comparisons, settings, descriptor)
        reasons[rows[duplicates(left.sha256, left.scores, left.keys, comparing, device)]] = "duplicate"
    return reasons, copied


def choose(described: Described, reasons: np.ndarray, settings: CurateSettings, besides: Besides) -> None:
    """The second half, of what is fit: the best share of each class, up to the cap."""
    rows, left = _left(described, reasons)
    reasons[rows[~_scored_well(left, settings)]] = "clip_score"
    besides("scored", reasons)
    rows, left = _left(described, reasons)
    reasons[rows[~within_cap(left.scores, left.labels, left.keys, settings.class_cap)]] = "class_cap"


def _left(described: Described, reasons: np.ndarray) -> tuple[np.ndarray, Described]:
    rows = np.flatnonzero(reasons == "")
    return rows, described.take(rows)


def _scored_well(left: Described, settings: CurateSettings) -> np.ndarray:
    """Rows that reach the threshold, if there is one, and are of the best share of their class, if not all of it is kept."""
    well = np.ones(len(left.keys), bool)
    if settings.least_score is not None:
        well &= left.scores >= settings.least_score
    if settings.keep_fraction is not None:
        well &= top_fraction(left.scores, left.labels, left.keys, settings.keep_fraction)
    return well


def curation_record(task: Task, clip: Clip, settings: CurateSettings, steps: Sequence[Step] = ()) -> dict[str, Any]:
    """What the decisions follow from, the candidates aside. No path stands here: the descriptor is named by its weights."""
    asked: dict[str, Any] = {"steps": {step.name: step.follows_from for step in steps}} if steps else {}
    if settings.decontaminate and shifts_beside(task, settings.decontaminate_against):
        asked["shifts"] = task.shift_fingerprints
    return asked | {
        "settings": settings.model_dump(mode="json", exclude={"descriptor", "descriptor_threshold"}),
        "descriptor": find_descriptor(settings).record,
        "clip": clip.fingerprint,
        "task": task.fingerprint,
    }


def _describe(
    folder: Path,
    table: pa.Table,
    task: Task,
    seen: Seen,
    settings: CurateSettings,
    progress: Progress | None,
) -> Described:
    """Look at every image of `table` once; nothing but embeddings, descriptors and hashes is held."""
    keys, sha256 = table["key"].to_pylist(), table["sha256"].to_pylist()
    square = View("square", seen.clip.image_size)
    kinds = [clip_kind(seen.clip), seen.kind, Kind(perceptual.NAME, perceptual.NAME, square, perceptual.describe)]
    named = [f"{folder}: {shard}: {key}" for shard, key in zip(table["shard"].to_pylist(), keys, strict=True)]
    features, descriptors, hashes = describe(
        kinds, sha256, named, lambda start, stop: seen.read(keys[start:stop]), seen.cache, progress
    )
    labels = table["label"].to_numpy()
    scores = _scores(task, seen.clip, features, labels, settings)
    return Described(
        np.array(keys, dtype=np.str_), labels, np.array(sha256, dtype=np.str_), features, descriptors, hashes, scores
    )


def _reader(folder: Path, table: pa.Table) -> Callable[[Sequence[str]], list[bytes]]:
    """The images' bytes by key."""
    shards = dict(zip(table["key"].to_pylist(), table["shard"].to_pylist(), strict=True))
    reader = ShardReader(folder)
    return lambda keys: reader.read([(shards[key], key) for key in keys])


def clip_kind(clip: Clip) -> Kind:
    """Embeddings: (n, d) float32, unit length."""
    view = View("square", clip.image_size)
    return Kind("clip", clip.fingerprint, view, partial(image_features, clip, batch_size=_BATCH))


def _scores(task: Task, clip: Clip, features: np.ndarray, labels: np.ndarray, settings: CurateSettings) -> np.ndarray:
    if settings.score == "mean":
        class_weights = clip.class_weights(task.class_names, as_functions(task.templates)).cpu().numpy()
        return clip_scores(features, class_weights, labels)

    def template_features(label: int) -> np.ndarray:
        return text_features(clip, [filled(template, task.class_names[label]) for template in task.templates])

    return best_template_scores(features, template_features, labels)


def _leave_out(
    folder: Path,
    task: Task,
    table: pa.Table,
    described: Described,
    reasons: np.ndarray,
    settings: CurateSettings,
    excluded: Collection[str],
) -> list[str]:
    """Give what is left of classes that are `excluded` or too small its reason; their names, in the order of the task's ids.

    Raises `UsageError` where that is not asked for. The decisions are then written, without a seal: a user can see what went why.
    """
    names = task.class_names
    short = short_classes(described.labels[reasons == ""], len(names), settings.least_per_class).tolist()
    new = [label for label in short if names[label] not in excluded]
    left_out = sorted({*new, *(names.index(name) for name in excluded)})
    if new and (settings.on_short_class == "error" or len(left_out) == len(names)):
        manifest = _manifest(table, described, reasons, np.full(len(reasons), -1, np.int64))
        write_table(folder / MANIFEST_TABLE, manifest)
        raise UsageError(_too_small(folder, task, manifest, settings, new))
    reasons[(reasons == "") & np.isin(described.labels, left_out)] = "short_class"
    return [names[label] for label in left_out]


def _too_small(folder: Path, task: Task, manifest: pa.Table, settings: CurateSettings, short: list[int]) -> str:
    """Which classes are too small, and what to do."""
    labels, reasons = manifest["label"].to_numpy(), np.array(manifest["reason"].to_pylist(), str)
    told = []
    for label in short[:_SHOWN]:
        mine = reasons[labels == label]
        why, counts = np.unique(mine[mine != ""], return_counts=True)
        gone = ", ".join(f"{count} {reason}" for reason, count in zip(why.tolist(), counts.tolist(), strict=True))
        kept = f"{task.class_names[label]!r} keeps {(mine == '').sum()} of {len(mine)} candidates"
        told.append(kept + f" ({gone})" * bool(gone))
    more = f" and {len(short) - _SHOWN} more classes" if len(short) > _SHOWN else ""
    way_out = (
        ", keep more of them, or leave such classes out, for every source, with curate.on_short_class=exclude"
        if len(short) < len(task.class_names)
        else " or keep more of them; no class keeps enough, so none can be left out"
    )
    return (
        f"{folder}: {'; '.join(told)}{more}, under curate.least_per_class={settings.least_per_class} "
        f"({MANIFEST_TABLE} has the reason of each): get more candidates{way_out}"
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
