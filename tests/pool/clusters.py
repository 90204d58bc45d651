"""A small pool of clustered vectors on disk, and a recipe for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.recipe import IndexRecipe

DIM = 32
RECIPE = IndexRecipe(
    name="test",
    pool="clusters",
    model="none",
    modality="image",
    factory_string="IVF32,SQ8",
    nprobe=4,
    train_rows=1500,
    seed=3,
)


def clusters(rng: np.random.Generator, n: int) -> np.ndarray:
    centres = np.random.default_rng(0).standard_normal((40, DIM))
    vectors = centres[rng.integers(40, size=n)] + 0.8 * rng.standard_normal((n, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_pool(folder: Path, vectors: np.ndarray, shard_rows: int = 1700) -> Pool:
    for number, start in enumerate(range(0, len(vectors), shard_rows)):
        part = vectors[start : start + shard_rows].astype(np.float16)
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", part)
        table = pa.table({"url": [f"http://x/{start + i}" for i in range(len(part))], "caption": ["c"] * len(part)})
        pq.write_table(table, folder / f"metadata/metadata_{number:04d}.parquet")
    return open_pool(str(folder))
