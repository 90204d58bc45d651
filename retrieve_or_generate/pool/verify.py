"""A pool looked at whole: every row of every shard, where opening it looks at a sample.

All that is wrong is collected before it is said, since one pass over a pool of web scale takes an hour.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.pool.columns import ALIASES, read_columns, row_hashes, tells
from retrieve_or_generate.pool.layout import Pool, PoolShard, wrong_norm
from retrieve_or_generate.pool.tars import image_members

_BLOCK_ROWS = 16384
_SHOWN = 5


@dataclass(frozen=True)
class PoolCheck:
    """What a pool holds, every row looked at. `missing` are shard numbers below the highest that are not there.

    `foreign_ids` are rows of shards whose recorded ids are made in another way than LAION's.
    """

    rows: int
    dim: int
    shards: int
    texts: int
    images: int
    missing: tuple[str, ...]
    foreign_ids: int = 0


def verify_pool(pool: Pool, progress: Callable[[int, int], None] | None = None) -> PoolCheck:
    """Look at every embedding (finite, unit length), every metadata column and every tar of `pool`.

    Recorded ids (`hash`) are compared with those that follow from URL and caption; a shard in which none agrees has ids of another
    making, one in which some agree is damaged. `progress` is told rows done and rows in all. Raises `IntegrityError` that names the
    files which are wrong, and where.
    """
    wrong: list[str] = []
    images = foreign = 0
    for shard in pool.shards:
        wrong += _wrong_embeddings(pool, shard)
        try:
            read_columns(shard.metadata, [name for name in ALIASES if name != "hash"])
            foreign += _foreign_ids(shard)
            images += len(image_members(shard.images)) if shard.images else 0
        except IntegrityError as error:
            wrong.append(str(error))
        if progress:
            progress(shard.first_row + shard.rows, pool.rows)
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} files more)" if len(wrong) > _SHOWN else ""
        raise IntegrityError("; ".join(wrong[:_SHOWN]) + more)
    texts = sum(shard.rows for shard in pool.shards if shard.text_embeddings)
    return PoolCheck(pool.rows, pool.dim, len(pool.shards), texts, images, tuple(_missing(pool)), foreign)


def _wrong_embeddings(pool: Pool, shard: PoolShard) -> list[str]:
    paths: dict[str, Path | None] = {"image": shard.image_embeddings, "text": shard.text_embeddings}
    found = []
    for modality in ("image", "text"):
        if (path := paths[modality]) is not None and (told := _wrong_row(pool.embeddings(shard, modality))):
            found.append(f"{path}: {told}")
    return found


def _wrong_row(embeddings: np.ndarray) -> str | None:
    norms = np.concatenate([_norms(embeddings[at : at + _BLOCK_ROWS]) for at in range(0, len(embeddings), _BLOCK_ROWS)])
    return wrong_norm(norms, np.arange(len(norms)))


def _norms(block: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(block)).float().square_().sum(1).sqrt_().numpy()


def _foreign_ids(shard: PoolShard) -> int:
    """Rows with an id that is not the hash of URL (of what the source calls a row without one) and caption.

    Raises `IntegrityError` where that is so of some of the shard's ids only.
    """
    if not tells(shard.metadata, "hash"):
        return 0
    told = read_columns(shard.metadata, ("hash", "url", "image_path", "caption"))
    recorded = told["hash"].fill_null(0).to_numpy()
    wrong = told["hash"].is_valid().to_numpy() & (recorded != row_hashes(told["url"], told["caption"]))
    if wrong.any():
        named = pc.if_else(pc.equal(told["url"], ""), None, told["url"])
        names = pc.coalesce(named, told["image_path"].cast(pa.string()))
        wrong &= recorded != row_hashes(names, told["caption"])
    known = shard.rows - told["hash"].null_count
    if (count := int(wrong.sum())) in (0, known):
        return count
    first = np.flatnonzero(wrong)[0]
    raise IntegrityError(
        f"{shard.metadata}: hash of row {first} is not that of its URL and caption ({count} such rows of {known})"
    )


def _missing(pool: Pool) -> Iterator[str]:
    for part in pool.parts:
        names = [s.image_embeddings.name for s in pool.shards if s.image_embeddings.is_relative_to(part)]
        numbers = {int(match[1]) for name in names if (match := re.fullmatch(r"img_emb_(\d+)\.npy", name))}
        yield from (f"{part.name}/img_emb_{n:04d}.npy" for n in range(max(numbers, default=-1)) if n not in numbers)
