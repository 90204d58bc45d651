"""The search of a pool for all classes of one or several tasks, in one pass over it.

Reads a pool; writes for each task a folder with `neighbours.parquet` (rows near a query, by embedding) and `captions.parquet` (rows
whose caption names a class), each sealed by a JSON file beside it, so that a finished half is not searched for again. What is
found depends neither on which tasks are searched for together nor on how often the search was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import RetrieveSettings
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.pool.scan import scan
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.retrieve.captions import match_captions
from retrieve_or_generate.retrieve.engines import Engine
from retrieve_or_generate.retrieve.queries import Queries, class_queries, templates_for
from retrieve_or_generate.store import content_key, durable_file, read_seal, seal, sha256_of
from retrieve_or_generate.tasks.base import Task

NEIGHBOURS = pa.schema([("row", pa.int64()), ("label", pa.int64())])
_VERSION = 1  # part of every key: raise when the same settings find other rows
_BY_EMBEDDING, _BY_CAPTION = "neighbours", "captions"
_DECIDE = {
    _BY_EMBEDDING: ("model", "modalities", "k", "examples_per_class", "service", "rows"),
    _BY_CAPTION: ("caption_semantics", "rows"),
}
_STATE = ".scan"


@dataclass(frozen=True)
class Search:
    """What is searched, with which model, and how."""

    pool: Pool
    clip: Clip
    settings: RetrieveSettings
    engine: Engine

    @property
    def parts(self) -> tuple[str, ...]:
        """The halves of the search that the strategy asks for."""
        semantic, substring = self.settings.strategy != "substring", self.settings.strategy != "semantic"
        return (_BY_EMBEDDING,) * semantic + (_BY_CAPTION,) * substring

    def key(self, task: Task, part: str) -> str:
        """What the rows that `part` finds for `task` follow from."""
        told = identified(self.settings)
        what: dict[str, Any] = {name: told[name] for name in _DECIDE[part]}
        if part == _BY_EMBEDDING:
            what |= {"templates": templates_for(task, self.settings), "model": self.clip.fingerprint}
            what |= {"engine": [self.engine.name, self.engine.identity]}
        return content_key([_VERSION, part, task.fingerprint, self.pool.fingerprint, what])


@dataclass(frozen=True)
class Found:
    """Rows and labels in ascending order, None where the strategy does not look; and how they were found."""

    neighbours: pa.Table | None = None
    captions: pa.Table | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def identified(settings: RetrieveSettings) -> dict[str, Any]:
    """The settings with the contents of the files they name in place of their paths. `UsageError` for one that is not there."""
    told = settings.model_dump(mode="json")
    for name in ("allow", "block"):
        told["rows"][name] = [_content(path) for path in told["rows"][name]]
    if told["download"]["blocklist"] is not None:
        told["download"]["blocklist"] = _content(told["download"]["blocklist"])
    return told


def search_model(clip: Clip, settings: RetrieveSettings) -> Clip:
    """The model that searches: the one that the settings name, else `clip`."""
    return clip if settings.model in (None, clip.name) else load_clip(str(settings.model), str(clip.device))


def check_search(search: Search) -> None:
    """Raise `UsageError` where the pool cannot be searched, or its images not be had, in the way that is asked for."""
    pool, clip, settings = search.pool, search.clip, search.settings
    if pool.dim != clip.embed_dim or pool.model not in (clip.name, "unknown"):
        raise UsageError(
            f"{pool.folder} holds {pool.dim}-d embeddings of model {pool.model!r}, but {clip.name!r} gives {clip.embed_dim}; "
            "search a pool with the model that embedded it (retrieve.model)"
        )
    if settings.fetch == "shards" and any(shard.images is None for shard in pool.shards):
        raise UsageError(f"{pool.folder}: no images/ shards; set retrieve.fetch=http to download them")
    for modality in settings.modalities:
        pool.embeddings(pool.shards[0], modality)


def _content(path: str) -> str:
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file, but retrieve names it as a list of rows")
    return sha256_of(Path(path))


def read_found(search: Search, task: Task, folder: Path) -> Found | None:
    """What the search found for `task`; None while it is unfinished. Raises `IntegrityError` for a changed file."""
    found: dict[str, Any] = {"facts": {}}
    for part in search.parts:
        record = read_seal(folder, f"{part}.json", search.key(task, part))
        if record is None:
            return None
        found[part] = pq.read_table(folder / f"{part}.parquet")
        found["facts"][part] = record["facts"]
    return Found(**found)


def run_search(search: Search, folders: Mapping[Path, Task], scratch: Path, progress: Progress | None = None) -> None:
    """Search for the task of every folder and write there what was found; what is finished is left as it is.

    All tasks are looked for at once: each embedding and each caption of the pool is read once, however many tasks there are.
    `scratch` keeps what an unfinished scan knows. The caller holds the locks of the folders.
    """
    work = {_BY_EMBEDDING: _by_embedding, _BY_CAPTION: _by_caption}
    for part in search.parts:
        keys = {folder: search.key(task, part) for folder, task in folders.items()}
        if all(read_seal(folder, f"{part}.json", key) for folder, key in keys.items()):
            continue
        tables, facts = work[part](search, list(folders.values()), scratch, progress)
        for (folder, key), table in zip(keys.items(), tables, strict=True):
            _write(folder, part, key, table, facts)
    shutil.rmtree(scratch / _STATE, ignore_errors=True)


def _write(folder: Path, part: str, key: str, table: pa.Table, facts: dict[str, Any]) -> None:
    (folder / f"{part}.json").unlink(missing_ok=True)
    path = folder / f"{part}.parquet"
    with durable_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", store_schema=False)
    seal(folder, f"{part}.json", key, [path], facts=facts)


def _by_embedding(
    search: Search, tasks: list[Task], scratch: Path, progress: Progress | None
) -> tuple[list[pa.Table], dict[str, Any]]:
    """`NEIGHBOURS` of each task, and how they were found."""
    asked = [class_queries(task, search.clip, search.settings) for task in tasks]
    found = _neighbours(search, np.concatenate([queries.features for queries in asked]), scratch, progress)
    first, tables = 0, []
    for queries in asked:
        part = slice(first, first + len(queries.texts))
        tables.append(_pairs(queries, [rows[part] for rows in found.values()]))
        first = part.stop
    return tables, {"engine": search.engine.name, "exact": True}


def _pairs(queries: Queries, found: list[np.ndarray]) -> pa.Table:
    """Rows found for any query of a class, (q, k) each with -1 for none, as `NEIGHBOURS`."""
    pairs = [np.zeros((2, 0), np.int64)]
    for label, places in enumerate(queries.of_class):
        rows = np.unique(np.concatenate([part[places].ravel() for part in found]))
        rows = rows[rows >= 0]
        pairs.append(np.stack([rows, np.full(len(rows), label)]))
    rows, labels = np.concatenate(pairs, axis=1)
    order = np.lexsort((labels, rows))
    return pa.table([rows[order], labels[order]], schema=NEIGHBOURS)


def _neighbours(search: Search, xq: np.ndarray, scratch: Path, progress: Progress | None) -> dict[Modality, np.ndarray]:
    """(q, k) rows among the embeddings of each kind."""
    pool, settings = search.pool, search.settings
    if search.engine.name == "scan":
        return {
            modality: scan(xq, (pool.embeddings(shard, modality) for shard in pool.shards), settings.k)[1]
            for modality in settings.modalities
        }
    from retrieve_or_generate.pool.index import build_index, load_recipe, search_index

    assert search.engine.index is not None
    recipe = load_recipe(settings.index)
    folder = build_index(pool, recipe, search.engine.index)
    return {recipe.modality: search_index(folder, pool, xq, settings.k)[1]}


def _by_caption(
    search: Search, tasks: list[Task], scratch: Path, progress: Progress | None
) -> tuple[list[pa.Table], dict[str, Any]]:
    """Row, label and query of each task's classes in the pool's captions, and how they were found."""
    semantics = search.settings.caption_semantics
    captions = search.pool.metadata(columns=("caption",))["caption"]
    tables = [
        match_captions(captions, {label: [name] for label, name in enumerate(task.class_names)}, semantics)
        for task in tasks
    ]
    return tables, {"semantics": semantics}
