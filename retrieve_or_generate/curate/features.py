"""The embeddings of a finished image set, out of what its curation kept where that holds, and made anew where it does not."""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.curate.curation import CACHE, clip_kind
from retrieve_or_generate.curate.kinds import CHUNK, ArrayCache, describe
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.models import Clip


def kept_features(image_set: ImageSet, clip: Clip, cache: ArrayCache) -> np.ndarray:
    """(n, d) float32, unit length: a row for each image of the set, in the order of `kept`. Its folder is only read.

    `cache` keeps what has to be computed. Raises `IntegrityError` naming an image that cannot be decoded.
    """
    kept, kind = image_set.kept, clip_kind(clip)
    known = _known(image_set, clip)
    if known is not None:
        keys, features = known
        return np.asarray(features[np.searchsorted(keys, kept["key"].to_numpy(str))])
    keys, sha256 = kept["key"].tolist(), kept["sha256"].tolist()
    named = [f"{image_set.folder}: {key}" for key in keys]
    return describe([kind], sha256, named, lambda start, stop: image_set.images(keys[start:stop]), cache)[0]


def _known(image_set: ImageSet, clip: Clip) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys in ascending order and their embeddings, as curation keeps them; None where a part is not as it was written."""
    rows = image_set.manifest[image_set.manifest["shard"] != ""].sort_values("key")
    cache, kind, sha256 = ArrayCache(image_set.folder / CACHE), clip_kind(clip), rows["sha256"].tolist()
    parts = []
    for start in range(0, len(sha256), CHUNK):
        chunk = sha256[start : start + CHUNK]
        part = cache.read(kind.key(chunk), len(chunk))
        if part is None:
            return None
        parts.append(part)
    return (rows["key"].to_numpy(str), np.concatenate(parts)) if parts else None
