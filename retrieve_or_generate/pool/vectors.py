"""Single rows of a pool's embeddings, read from where they lie in the shards."""

from __future__ import annotations

import numpy as np

from retrieve_or_generate.pool.layout import Modality, Pool


def vectors(pool: Pool, modality: Modality, rows: np.ndarray) -> np.ndarray:
    """(n, d) float16 embeddings of `rows` (n,), which ascend."""
    parts = [np.zeros((0, pool.dim), np.float16)]
    for shard in pool.shards:
        start, stop = np.searchsorted(rows, [shard.first_row, shard.first_row + shard.rows])
        if stop > start:
            parts.append(pool.embeddings(shard, modality)[rows[start:stop] - shard.first_row])
    return np.concatenate(parts)
