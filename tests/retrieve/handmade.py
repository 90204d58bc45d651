"""A pool whose embeddings are made by hand, a task without pictures, and a model that knows its queries by heart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.tasks.base import Task

DIM, ROWS = 16, 300
CLIP: Any = SimpleNamespace(name="made by hand", embed_dim=DIM, fingerprint="0123", device="cpu")


class Wordless(Task):
    """A task without pictures."""

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return self.name


TASK = Wordless("birds", ("ant", "bee", "cat"), ("a {}.", "photo of a {}", "{}"), Path("nowhere"))


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    vectors = rng.standard_normal((n, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


QUERIES = unit(np.random.default_rng(0), 9)
EMBEDDINGS = {"image": unit(np.random.default_rng(1), ROWS), "text": unit(np.random.default_rng(2), ROWS)}
CAPTIONS = ["an ant and a bee" if row % 50 == 7 else f"plant {row}" if row % 30 == 1 else None for row in range(ROWS)]


def text_features(clip: Any, texts: list[str]) -> np.ndarray:
    """(n, d): the nine queries, over and over."""
    return np.resize(QUERIES, (len(texts), DIM))


def write_pool(folder: Path) -> Pool:
    for kind, name in (("image", "img_emb"), ("text", "text_emb")):
        (folder / name).mkdir(parents=True)
        for number, part in enumerate(np.split(EMBEDDINGS[kind], [170])):
            np.save(folder / f"{name}/{name}_{number:04d}.npy", part.astype(np.float16))
    (folder / "metadata").mkdir()
    for number, (start, stop) in enumerate([(0, 170), (170, ROWS)]):
        rows = range(start, stop)
        table = {
            "TEXT": CAPTIONS[start:stop],
            "URL": [f"http://x/{row}" for row in rows],
            "punsafe": [row / ROWS for row in rows],
        }
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number:04d}.parquet")
    return open_pool(str(folder))
