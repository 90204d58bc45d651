"""Copies of the pool's images among generated ones: what the generator learned by heart.

One pass over the pool's embeddings finds the rows nearest to every image of a set; the copy descriptor of curation then compares
the image with their pictures, which come from the pool's shards or, where it has none, from the retrieved set. What the pass found
is kept in `.memorised/` of the set's folder, by the images' hashes: of images that come later only those are looked up.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retrieve_or_generate.curate.curation import clip_kind
from retrieve_or_generate.curate.described import Described
from retrieve_or_generate.curate.descriptor import Descriptor, find_descriptor
from retrieve_or_generate.curate.kinds import describe
from retrieve_or_generate.curate.steps import Decision, Seen, Step
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pixels import UndecodableImage, decode
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.pool.scan import Found, scan_pool
from retrieve_or_generate.progress import Bytes
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.store import content_key, durable_file, read_seal, seal

Progress = Callable[[int, int], None]
Rule = Literal["report", "drop", "off"]

NEIGHBOURS = 10
"""Rows of the pool, the nearest, with which an image is compared."""

_VERSION = 1  # part of what identifies a set: raise when the same images are judged otherwise
_FOLDER, _TABLE, _SEAL = ".memorised", "nearest.npz", "nearest.json"
_PICTURES = 256  # of the pool, held at once


@dataclass(frozen=True)
class KnownPool:
    """What a generator may have learned by heart: a pool, and the model that embedded it. `UsageError` if that is another."""

    pool: Pool
    model: str

    def __post_init__(self) -> None:
        if self.pool.model not in (self.model, "unknown"):
            raise self.misfit(f"of model {self.pool.model!r}, not of {self.model!r}")

    def misfit(self, what: str) -> UsageError:
        return UsageError(
            f"{self.pool.folder} holds embeddings {what}: name the model that made them as retrieve.model, or generate without "
            "looking for copies of the pool (synthesize.memorised=off)"
        )

    def embed(self, left: Described, seen: Seen) -> tuple[np.ndarray, str]:
        """The images as the pool's model sees them, (n, d) float32, and that model's fingerprint."""
        device = str(seen.clip.device)
        clip: Clip = seen.clip if self.model == seen.clip.name else load_clip(self.model, device)
        if clip.embed_dim != self.pool.dim:
            raise self.misfit(f"of {self.pool.dim} dimensions, but {self.model!r} gives {clip.embed_dim}")
        if clip is seen.clip:
            return left.features, clip.fingerprint
        keys: list[str] = left.keys.tolist()
        [features] = describe(
            [clip_kind(clip)], left.sha256.tolist(), keys, lambda start, stop: seen.read(keys[start:stop]), seen.cache
        )
        return features, clip.fingerprint


@dataclass(frozen=True)
class Copies:
    """`of`: image (its place) to the pool's row that it copies and their cosine; the nearest where it copies several.

    `unseen`: images that lie as near to a row as copies do, but of whose rows no picture can be had. `nearest`: of every image,
    the cosine of the nearest row.
    """

    of: dict[int, tuple[int, float]] = field(default_factory=dict)
    unseen: int = 0
    nearest: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


def memorised_step(
    rule: Rule,
    known: KnownPool | None,
    like: ImageSet,
    curation: CurateSettings,
    folder: Path,
    progress: Progress | None = None,
) -> Step | None:
    """The search as a step of the curation of `folder`; None where it is off.

    To be reported, the images that are kept are looked at; to be dropped, all that are fit, before any is chosen, so that the
    filter keeps the share of the others that it keeps of any source. Without the pool at hand (a service searched it) the
    record says that none was looked at. `progress` is called with bytes of the pool passed and bytes in all.
    """
    if rule == "off":
        return None

    def decide(left: Described, seen: Seen) -> Decision:
        goes = np.zeros(len(left.keys), bool)
        if known is None:
            return goes, {"rule": rule, "checked": 0, "found": 0, "pairs": [], "why": "the pool is not at hand"}
        copies = find_memorised(left, known, like, curation, seen, folder / _FOLDER, progress)
        goes[list(copies.of)] = rule == "drop"
        return goes, {"rule": rule, **_told(left, copies)}

    follows_from = {"version": _VERSION, "rule": rule, "pool": known and known.pool.fingerprint}
    return Step("memorised", "first" if rule == "drop" else "last", "memorised", follows_from, decide)


def _told(left: Described, copies: Copies) -> dict[str, Any]:
    pairs = [
        {"key": str(left.keys[place]), "row": row, "cosine": round(cosine, 4)}
        for place, (row, cosine) in sorted(copies.of.items())
    ]
    spread = {"median": 0.5, "p99": 0.99, "max": 1.0} if len(copies.nearest) else {}
    nearest = {name: round(float(np.quantile(copies.nearest, share)), 4) for name, share in spread.items()}
    found = {"checked": len(left.keys), "found": len(pairs), "unseen": copies.unseen}
    return found | {"nearest_cosine": nearest, "pairs": pairs}


def find_memorised(
    left: Described,
    known: KnownPool,
    like: ImageSet,
    curation: CurateSettings,
    seen: Seen,
    scratch: Path,
    progress: Progress | None = None,
) -> Copies:
    """Which images of `left` copy a row of the pool, by the copy descriptor, among the `NEIGHBOURS` rows nearest to each.

    As within a set, thumbnails need a cosine of `curate.duplicate_cosine` as well, learned descriptors do not. `scratch` keeps what
    the pass over the pool found. Raises `UsageError` where the pool is of another model.
    """
    features, fingerprint = known.embed(left, seen)
    descriptor = find_descriptor(curation)
    device = str(seen.clip.device)
    cosine, row = _nearest(known.pool, features, fingerprint, left.sha256, scratch, device, progress)
    least = -1.0 if descriptor.is_precise else curation.duplicate_cosine
    image, column = ((row >= 0) & (cosine >= least)).nonzero()
    rows, cosines = row[image, column], cosine[image, column]
    agree, looked = _compared(left, image, rows, known.pool, like, descriptor, seen)
    best: dict[int, tuple[int, float]] = {}
    for pair in np.lexsort((rows, -cosines, image)).tolist():
        if agree[pair]:
            best.setdefault(int(image[pair]), (int(rows[pair]), float(cosines[pair])))
    unseen = set(image.tolist()) - set(image[looked].tolist())
    return Copies(best, len(unseen), cosine[:, 0])


def _compared(
    left: Described,
    image: np.ndarray,
    rows: np.ndarray,
    pool: Pool,
    like: ImageSet,
    descriptor: Descriptor,
    seen: Seen,
) -> tuple[np.ndarray, np.ndarray]:
    """For pairs of image and row, (p,) each: do they show one picture, and could the row's be looked at? (p,) bool each."""
    agree, looked = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    order = np.argsort(rows, kind="stable")
    for wanted, pictures in _pictures(pool, like, np.unique(rows)):
        views = [seen.kind.view.of(picture) for picture in pictures]
        described = seen.kind.compute(np.stack(views).transpose(0, 3, 1, 2).copy())
        first, last = np.searchsorted(rows[order], [wanted[0], wanted[-1] + 1])
        pairs = order[first:last][np.isin(rows[order[first:last]], wanted)]
        others = described[np.searchsorted(wanted, rows[pairs])]
        aligned = np.arange(len(pairs))
        looked[pairs] = True
        agree[pairs] = descriptor.comparison(left.descriptors[image[pairs]], others).look(aligned, aligned)
    return agree, looked


def _pictures(pool: Pool, like: ImageSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Rows, in ascending order, with their pictures, a number at a time; those of which none can be had are left out."""
    sharded = all(shard.images is not None for shard in pool.shards)
    retrieved = {} if sharded else _keys_by_row(like, pool)
    for start in range(0, len(rows), _PICTURES):
        part = rows[start : start + _PICTURES].tolist()
        if sharded:
            data = pool.image_bytes(part)
        else:
            there = [row for row in part if row in retrieved]
            data = dict(zip(there, like.images([retrieved[row] for row in there]), strict=True))
        pictures = {row: picture for row, one in data.items() if (picture := _decoded(one)) is not None}
        if pictures:
            yield np.array(sorted(pictures)), [pictures[row] for row in sorted(pictures)]


def _decoded(data: bytes) -> np.ndarray | None:
    try:
        return decode(data)
    except UndecodableImage:
        return None


def _keys_by_row(like: ImageSet, pool: Pool) -> dict[int, str]:
    """Rows of the pool whose images the retrieved set holds, kept or not."""
    there = like.manifest[like.manifest["shard"] != ""]
    origins = [json.loads(origin) for origin in there["origin"]]
    return {
        int(origin["row"]): key
        for origin, key in zip(origins, there["key"], strict=True)
        if origin.get("pool") == pool.name and "row" in origin
    }


def _nearest(
    pool: Pool,
    features: np.ndarray,
    model: str,
    sha256: np.ndarray,
    scratch: Path,
    device: str,
    progress: Progress | None,
) -> Found:
    """Cosines (n, NEIGHBOURS) float32, best first, and rows, int64; -inf and -1 where the pool has fewer."""
    key = content_key([_VERSION, pool.fingerprint, model, NEIGHBOURS])
    hashes, D, I = _read(scratch, key)  # noqa: E741  FAISS's names
    first = np.unique(sha256, return_index=True)[1]
    new = first[~np.isin(sha256[first], hashes)]
    if len(new):
        state = scratch / content_key([key, sha256[new].tolist()])
        found = scan_pool(pool, features[new], NEIGHBOURS, device=device, state=state, progress=_in_bytes(progress))[
            "image"
        ]
        hashes = np.concatenate([hashes, sha256[new]])
        D, I = (np.concatenate([old, more]) for old, more in zip((D, I), found, strict=True))  # noqa: E741
        _write(scratch, key, hashes, D, I)
    order = np.argsort(hashes)
    place = order[np.searchsorted(hashes, sha256, sorter=order)]
    return D[place], I[place]


def _in_bytes(progress: Progress | None) -> Progress | None:
    return progress and (lambda done, total: progress(Bytes(done), Bytes(total)))


def _read(scratch: Path, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an earlier pass found: hashes, cosines and rows; none where it is damaged, or of another pool or model."""
    try:
        if read_seal(scratch, _SEAL, key) is not None:
            with np.load(scratch / _TABLE, allow_pickle=False) as arrays:
                return arrays["sha256"], arrays["D"], arrays["I"]
    except (IntegrityError, ValueError, KeyError, OSError):
        pass
    return np.empty(0, "<U64"), np.empty((0, NEIGHBOURS), np.float32), np.empty((0, NEIGHBOURS), np.int64)


def _write(scratch: Path, key: str, hashes: np.ndarray, D: np.ndarray, I: np.ndarray) -> None:  # noqa: E741
    """Keep what was found; the pass itself need not be gone on with any more."""
    path = scratch / _TABLE
    with durable_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, sha256=hashes, D=D, I=I)
    seal(scratch, _SEAL, key, [path])
    for state in scratch.iterdir():
        if state.is_dir():
            shutil.rmtree(state, ignore_errors=True)
