"""A FAISS index over a pool's embeddings: built from a recipe, searched from disk, its answers scored exactly.

Reads a pool and a recipe (`indexes/NAME.yaml`); writes `index.faiss` and, last, `index.json` with its sha256: a damaged index still
answers, only wrongly, so nothing but a checksum tells. An index is approximate. `measure_recall` says by how much, against the
exact scan; the number belongs into the recipe.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.pool.scan import pair_scores, scan
from retrieve_or_generate.pool.vectors import vectors
from retrieve_or_generate.store import content_key, durable_file, locked, read_seal, remove_leftovers, seal

RECIPES = Path(__file__).parents[1] / "indexes"
INDEX, INDEX_SEAL = "index.faiss", "index.json"
LEAST_QUERIES = 100
_VERSION = 1  # part of the key: raise when the same recipe gives another index
_ADD_ROWS = 65536


class Recall(BaseModel):
    """What was measured with the recipe's own nprobe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    k: int = Field(ge=1)
    queries: int = Field(ge=LEAST_QUERIES)
    recall_at_k: float = Field(ge=0, le=1, description="share of the true k that was found")


class IndexRecipe(BaseModel):
    """How an index is built and searched; what it indexes and how good it turned out."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    name: str
    pool: str
    model: str = Field(description="embedding model of the pool")
    modality: Modality
    factory_string: str = Field(description="for faiss.index_factory")
    nprobe: int = Field(ge=1, description="lists visited per query")
    train_rows: int = Field(ge=1, description="rows that the quantisers are trained on, drawn by seed")
    seed: int = 0
    recall: tuple[Recall, ...] = ()

    def key(self, pool: Pool) -> str:
        """What the index file follows from; nprobe and recall are about searching it."""
        return content_key([_VERSION, pool.fingerprint, self.model_dump(exclude={"name", "nprobe", "recall"})])


def load_recipe(name: str) -> IndexRecipe:
    """A recipe by name (of those in `indexes/`) or by file; `UsageError` for an unknown name or key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise unknown_name("index recipe", name, (known.stem for known in RECIPES.glob("*.yaml")))
    try:
        return IndexRecipe.model_validate({"name": path.stem, **yaml.safe_load(path.read_text(encoding="utf-8"))})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a mapping in YAML ({str(error).splitlines()[0]})") from None


def build_index(pool: Pool, recipe: IndexRecipe, out: Path) -> Path:
    """Build the index of `recipe` in folder `out`, unless it is there already; `out`.

    Raises `UsageError` where recipe and pool do not belong together, the factory string is none, or `out` holds another index.
    """
    _check_match(pool, recipe)
    key = recipe.key(pool)
    with locked(out, wait=True):
        if read_seal(out, INDEX_SEAL, key) is not None:
            return out
        if (out / INDEX_SEAL).exists():
            raise UsageError(f"{out}: holds an index of another pool or recipe; choose another folder or delete it")
        remove_leftovers(out)
        index = _trained(pool, recipe)
        for shard in pool.shards:
            embeddings = pool.embeddings(shard, recipe.modality)
            for start in range(0, shard.rows, _ADD_ROWS):
                index.add(embeddings[start : start + _ADD_ROWS].astype(np.float32))
        with durable_file(out / INDEX) as temporary:
            faiss.write_index(index, str(temporary))
        seal(out, INDEX_SEAL, key, [out / INDEX], recipe=recipe.model_dump(mode="json"), rows=pool.rows)
    return out


def _check_match(pool: Pool, recipe: IndexRecipe) -> None:
    for what, wanted, there in (("pool", recipe.pool, pool.name), ("model", recipe.model, pool.model)):
        if wanted != there and there != "unknown":
            raise UsageError(
                f"index recipe {recipe.name!r} is for {what} {wanted!r}, but {pool.folder} is of {there!r}"
            )


def _trained(pool: Pool, recipe: IndexRecipe) -> Any:
    try:
        index = faiss.index_factory(pool.dim, recipe.factory_string, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(
            f"index recipe {recipe.name!r}: {recipe.factory_string!r} is no index of dimension {pool.dim} ({reason})"
        ) from None
    if not index.is_trained:
        chosen = np.random.default_rng(recipe.seed).permutation(pool.rows)[: recipe.train_rows]
        index.train(vectors(pool, recipe.modality, np.sort(chosen)).astype(np.float32))
    return index


def search_index(
    folder: Path,
    pool: Pool,
    xq: np.ndarray,
    k: int,
    *,
    nprobe: int | None = None,
    overfetch: int = 2,
    verify: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """D (q, k) float32 and I (q, k) int64 as `scan` gives them, of the rows that the index finds.

    `xq` (q, d) float32, unit length. The index is read from disk where it lies; `overfetch` times k rows are taken from it, scored
    exactly from the embeddings, and the best k kept, ties by row number. `nprobe` replaces the recipe's for this call only. Without
    `verify` the file's checksum is not compared: for further calls on an index of many gigabytes.

    Raises `UsageError` if `folder` holds no index or one of another pool, `IntegrityError` if a byte of it changed.
    """
    record, recipe = _opened(folder, pool, verify)
    index = _mapped(folder / INDEX, record["files"][INDEX]["sha256"])
    wanted = min(k * overfetch, pool.rows)
    parameters = _parameters(index, nprobe or recipe.nprobe)
    queries = np.ascontiguousarray(xq, np.float32)
    _, found = index.search(queries, wanted, params=parameters)
    return _rescored(pool, recipe.modality, queries, found, k)


def _opened(folder: Path, pool: Pool, verify: bool = True) -> tuple[dict[str, Any], IndexRecipe]:
    record = read_seal(folder, INDEX_SEAL, verify=verify)
    if record is None:
        raise UsageError(f"{folder}: no finished index (no {INDEX_SEAL}); build it with rog index build")
    recipe = IndexRecipe.model_validate(record["recipe"])
    if record["key"] != recipe.key(pool):
        raise UsageError(f"{folder}: an index of another pool than {pool.folder}; build one for it")
    return record, recipe


@lru_cache(maxsize=4)
def _mapped(path: Path, sha256: str) -> Any:
    """The index with its lists left on disk where its type can; `sha256` is there to tell builds apart."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise IntegrityError(f"{path}: FAISS cannot read it ({str(error).strip().splitlines()[-1]})") from None


def _parameters(index: Any, nprobe: int) -> Any:
    """Search parameters for this call, through a pre-transform if there is one; None where there are no lists to probe."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        below = _parameters(inner.index, nprobe)
        return faiss.SearchParametersPreTransform(index_params=below) if below else None  # type: ignore[call-arg]
    if isinstance(inner, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(nprobe, inner.nlist))  # type: ignore[call-arg]
    return None


def _rescored(
    pool: Pool, modality: Modality, queries: np.ndarray, found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    query, place = np.nonzero(found >= 0)
    rows = found[query, place]
    distinct, position = np.unique(rows, return_inverse=True)
    scores = pair_scores(queries, vectors(pool, modality, distinct), query, position)
    order = np.lexsort((rows, -scores, query))
    query, rows, scores = query[order], rows[order], scores[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    best = rank < k
    D = np.full((len(queries), k), -np.inf, np.float32)
    I = np.full((len(queries), k), -1, np.int64)  # noqa: E741  FAISS's name for it
    D[query[best], rank[best]], I[query[best], rank[best]] = scores[best], rows[best]
    return D, I


def measure_recall(folder: Path, pool: Pool, xq: np.ndarray, k: int, nprobe: int | None = None) -> float:
    """Mean share of the true k nearest that the index finds, over at least a hundred queries `xq` (q, d)."""
    if len(xq) < LEAST_QUERIES:
        raise UsageError(f"recall of {len(xq)} queries says little; give at least {LEAST_QUERIES}")
    _, recipe = _opened(folder, pool)
    _, found = search_index(folder, pool, xq, k, nprobe=nprobe)
    _, true = scan(xq, (pool.embeddings(shard, recipe.modality) for shard in pool.shards), k)
    return float(np.mean([np.isin(t[t >= 0], f).mean() for t, f in zip(true, found, strict=True)]))
