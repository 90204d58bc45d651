"""The search of a pool for all classes of one or several tasks, in one pass over it.

Reads a pool; writes for each task a folder with `neighbours.parquet` (rows near a query, by embedding) and `captions.parquet` (rows
whose caption names a class), each sealed by a JSON file beside it, so that a finished half is not searched for again. What is
found depends neither on which tasks are searched for together nor on how often the search was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.executors import core_count
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pool.columns import tells
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.retrieve.captions import match_pool
from retrieve_or_generate.retrieve.engines import (
    Engine,
    choose_engine,
    excluded,
    index_neighbours,
    row_filter,
    scan_neighbours,
    service_neighbours,
)
from retrieve_or_generate.retrieve.queries import Queries, class_queries
from retrieve_or_generate.settings import RetrieveSettings, RowSettings
from retrieve_or_generate.store import content_key, durable_file, read_seal, seal, sha256_of
from retrieve_or_generate.tasks.base import Task
from retrieve_or_generate.tasks.templates import templates_for

NEIGHBOURS = pa.schema([("row", pa.int64()), ("label", pa.int64())])
ANSWERED = pa.schema(  # what a service found, and what it says of it
    [
        *NEIGHBOURS,
        ("score", pa.float32()),
        *((name, pa.string()) for name in ("query", "url", "caption", "NSFW")),
    ]
)
_VERSION = 1  # part of every key: raise when the same settings find other rows
_BY_EMBEDDING, _BY_CAPTION = "neighbours", "captions"
_DECIDE = {
    _BY_EMBEDDING: ("modalities", "k", "examples_per_class", "engine", "rows"),
    _BY_CAPTION: ("caption_semantics", "rows"),
}
_STATE = ".unfinished"
_MANY_ROWS = 20_000_000  # of captions: from here on starting workers to match them pays


@dataclass(frozen=True)
class Search:
    """What is searched, with which model, and how. No pool: a service searches its own."""

    pool: Pool | None
    clip: Clip
    settings: RetrieveSettings
    engine: Engine

    @property
    def parts(self) -> tuple[str, ...]:
        """The halves of the search that the strategy asks for."""
        return {"semantic": (_BY_EMBEDDING,), "substring": (_BY_CAPTION,), "both": (_BY_EMBEDDING, _BY_CAPTION)}[
            self.settings.strategy
        ]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings with what they stand for in place of paths: the engine that was taken, the rows that lists hold."""
        told = self.settings.model_dump(mode="json", exclude={"index", "service"})
        rows = row_filter(self.pool, self.settings.rows) if self.pool else None
        told |= {"engine": [self.engine.name, self.engine.identity], "rows": rows.fingerprint if rows else None}
        if told["download"]["blocklist"] is not None:
            told["download"]["blocklist"] = sha256_of(Path(told["download"]["blocklist"]))
        return told

    def key(self, task: Task, part: str) -> str:
        """What the rows that `part` finds for `task` follow from."""
        what: dict[str, Any] = {name: self.identity[name] for name in _DECIDE[part]}
        if part == _BY_EMBEDDING:
            what |= {"templates": templates_for(task, self.settings.templates), "model": self.clip.fingerprint}
        return content_key([_VERSION, part, task.fingerprint, self.pool and self.pool.fingerprint, what])


@dataclass(frozen=True)
class Found:
    """Rows and labels in ascending order, None where the strategy does not look; and how they were found."""

    neighbours: pa.Table | None = None
    captions: pa.Table | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def open_search(
    pool: Pool | None,
    clip: Clip,
    settings: RetrieveSettings,
    tasks: Sequence[Task],
    *,
    index_folder: Path | None = None,
    engine: Engine | None = None,
) -> Search:
    """The search that the settings ask for, checked. `clip` searches unless they name another model.

    Raises `UsageError` where the pool cannot be searched, or its images not be had, in the way that is asked for.
    """
    if settings.model not in (None, clip.name):
        clip = load_clip(str(settings.model), str(clip.device))
    queries = sum(len(task.class_names) * _per_class(task, settings) for task in tasks)
    _check(pool, clip, settings)
    _check_blocklist(settings.download.blocklist)
    engine = engine or choose_engine(pool, settings, queries, index_folder, str(clip.device))
    return Search(pool, clip, settings, engine)


def _per_class(task: Task, settings: RetrieveSettings) -> int:
    return len(templates_for(task, settings.templates)) + settings.examples_per_class


def _check(pool: Pool | None, clip: Clip, settings: RetrieveSettings) -> None:
    if pool is None:
        return _check_service(settings)
    if pool.dim != clip.embed_dim or pool.model not in (clip.name, "unknown"):
        raise UsageError(
            f"{pool.folder} holds {pool.dim}-d embeddings of model {pool.model!r}, but {clip.name!r} gives {clip.embed_dim}; "
            "search a pool with the model that embedded it (retrieve.model)"
        )
    if settings.fetch == "shards" and any(shard.images is None for shard in pool.shards):
        raise UsageError(f"{pool.folder}: no images/ shards; set retrieve.fetch=http to download them")
    if settings.fetch == "http" and not any(tells(shard.metadata, "url") for shard in pool.shards):
        raise UsageError(
            f"{pool.folder}: its metadata tells no URL to download from (retrieve.fetch=http); take the images from its own "
            "shards (retrieve.fetch=shards), or add a column url"
        )
    for modality in settings.modalities:
        for shard in pool.shards:
            pool.embeddings(shard, modality)
    return None


def _check_service(settings: RetrieveSettings) -> None:
    """A service is asked by meaning, knows one kind of score at a time, has no table of ours to filter, and no pictures."""
    asked = settings.model_dump(mode="json")
    for name, needed in (("strategy", "semantic"), ("fetch", "http"), ("examples_per_class", 0)):
        if asked[name] != needed:
            raise UsageError(f"a service (retrieve.engine=remote) needs retrieve.{name}={needed}")
    if settings.rows != RowSettings():
        raise UsageError(
            "a service (retrieve.engine=remote) does not say what retrieve.rows would filter by; leave it out"
        )
    if len(settings.modalities) > 1:
        raise UsageError(
            "a service's scores of images and of captions do not compare; ask for one of retrieve.modalities"
        )


def _check_blocklist(listed: str | None) -> None:
    """Read it: what is wrong with it is said before the search, not after."""
    if listed is not None and not Path(listed).is_file():
        raise UsageError(f"{listed}: no such file, but retrieve.download.blocklist names it")
    Blocklist.load(listed)


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
    `scratch` keeps what an unfinished search knows. The caller holds the locks of the folders.
    """
    work = {_BY_EMBEDDING: _by_service if search.pool is None else _by_embedding, _BY_CAPTION: _by_caption}
    for part in search.parts:
        keys = {folder: search.key(task, part) for folder, task in folders.items()}
        if all(read_seal(folder, f"{part}.json", key) for folder, key in keys.items()):
            continue
        state = scratch / _STATE / content_key(list(keys.values()))
        tables, facts = work[part](search, list(folders.values()), state, progress)
        for (folder, key), table in zip(keys.items(), tables, strict=True):
            _write(folder, part, key, table, facts, search.engine)
    shutil.rmtree(scratch / _STATE, ignore_errors=True)


def _write(folder: Path, part: str, key: str, table: pa.Table, facts: dict[str, Any], engine: Engine) -> None:
    (folder / f"{part}.json").unlink(missing_ok=True)
    path = folder / f"{part}.parquet"
    with durable_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", store_schema=False)
    seal(folder, f"{part}.json", key, [path], facts=facts, engine=[engine.name, engine.identity], why=engine.why)


Results = tuple[list[pa.Table], dict[str, Any]]
"""A table for each task, and how the rows were found."""


def _by_embedding(search: Search, tasks: list[Task], state: Path, progress: Progress | None) -> Results:
    """`NEIGHBOURS` of each task."""
    assert search.pool is not None
    asked = [class_queries(task, search.clip, search.settings) for task in tasks]
    xq = np.concatenate([queries.features for queries in asked])
    if progress and search.settings.engine == "auto":
        progress(f"searching by {search.engine.name}: {search.engine.why}", 1, 1)
    pool, settings, device = search.pool, search.settings, str(search.clip.device)
    if search.engine.name == "scan":
        found, facts = scan_neighbours(pool, settings, xq, state, device, progress)
    else:
        found, facts = index_neighbours(pool, search.engine, settings, xq, partial(_many, search, tasks), device)
    first, tables = 0, []
    for queries in asked:
        part = slice(first, first + len(queries.texts))
        tables.append(_pairs(queries, [rows[part] for rows in found.values()]))
        first = part.stop
    return tables, facts


def _many(search: Search, tasks: list[Task]) -> np.ndarray:
    """(q, d): each class in the 80 templates of ImageNet, so at least 160 queries; a thousand of them, evenly spread, at most."""
    settings = search.settings.model_copy(update={"templates": "imagenet", "examples_per_class": 0})
    features = np.concatenate([class_queries(task, search.clip, settings).features for task in tasks])
    return features[np.linspace(0, len(features) - 1, min(len(features), 1000)).astype(int)]


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


def _by_service(search: Search, tasks: list[Task], state: Path, progress: Progress | None) -> Results:
    """`ANSWERED` of each task: for every row and class the best answer."""
    settings, tables = search.settings, []
    [modality] = settings.modalities
    for task in tasks:
        queries = class_queries(task, search.clip, settings)
        answers = service_neighbours(settings.service, queries.features, settings.k, modality, progress)
        best: dict[tuple[int, int], dict[str, Any]] = {}
        for label, places in enumerate(queries.of_class):
            for place in places.tolist():
                for row in answers[place]:
                    pair = (row["id"], label)
                    if pair not in best or row["similarity"] > best[pair]["score"]:
                        told = {name: row[name] for name in ("url", "caption", "NSFW")}
                        best[pair] = {"score": row["similarity"], "query": queries.texts[place], **told}
        rows = [{"row": row, "label": label, **best[row, label]} for row, label in sorted(best)]
        tables.append(pa.Table.from_pylist(rows, ANSWERED))
    return tables, {"engine": "remote", "exact": False, "recall": None}


def _by_caption(search: Search, tasks: list[Task], state: Path, progress: Progress | None) -> Results:
    """Row, label and query of each task's classes in the pool's captions; labels are counted on from task to task meanwhile."""
    assert search.pool is not None
    firsts = np.cumsum([0, *(len(task.class_names) for task in tasks)])
    asked = {
        first + label: query
        for task, first in zip(tasks, firsts.tolist(), strict=False)
        for label, query in task.caption_queries.items()
    }
    semantics = search.settings.caption_semantics
    told = partial(progress, f"captions of {search.pool.name}") if progress else None
    jobs = core_count() if search.pool.rows > _MANY_ROWS else 1
    matches = match_pool(search.pool, asked, semantics, told, state=state, jobs=jobs)
    matches, left_out = _allowed(search.pool, search.settings, matches)
    tables = []
    for first, end in pairwise(firsts.tolist()):
        mine = matches.filter(pc.and_(pc.greater_equal(matches["label"], first), pc.less(matches["label"], end)))
        tables.append(mine.set_column(1, "label", pc.subtract(mine["label"], first)))
    return tables, {"semantics": semantics, "excluded": left_out}


def _allowed(pool: Pool, settings: RetrieveSettings, matches: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The matches in rows that the settings leave in, and how many rows of the pool they leave out for which reason."""
    rows = row_filter(pool, settings.rows)
    if rows is None:
        return matches, {}
    found = matches["row"].to_numpy()
    fit = np.ones(len(found), bool)
    for shard in pool.shards:
        mask = rows.mask(shard)
        start, stop = np.searchsorted(found, [shard.first_row, shard.first_row + shard.rows])
        if mask is not None:
            fit[start:stop] = mask[found[start:stop] - shard.first_row]
    return matches.filter(pa.array(fit)), excluded(rows)
