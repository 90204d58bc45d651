"""Candidates for a task's classes, by meaning and by name.

Takes a pool and a task; gives rows of the pool, each for one class, with a score and the query that found it. Every class name in
every template is a query; its neighbours are looked for among the pool's image or caption embeddings, or both. A candidate's
score is the cosine of its best query, averaged over the embeddings searched, however the candidate was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import RetrieveSettings
from retrieve_or_generate.models import Clip, text_features
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.pool.scan import pair_scores, scan
from retrieve_or_generate.pool.vectors import vectors
from retrieve_or_generate.retrieve.captions import match_captions
from retrieve_or_generate.tasks.base import Task

CANDIDATES = pa.schema([("row", pa.int64()), ("label", pa.int64()), ("score", pa.float32()), ("query", pa.string())])


@dataclass(frozen=True)
class Queries:
    """Class names in templates: `texts[label * templates + t]`, and their (q, d) float32 unit features."""

    texts: tuple[str, ...]
    features: np.ndarray
    templates: int

    def of(self, labels: np.ndarray) -> np.ndarray:
        """(n, templates): the queries of each label."""
        return labels[:, None] * self.templates + np.arange(self.templates)


def class_queries(task: Task, clip: Clip) -> Queries:
    texts = tuple(template.replace("{}", name) for name in task.class_names for template in task.templates)
    return Queries(texts, text_features(clip, texts), len(task.templates))


def check_search(pool: Pool, clip: Clip, settings: RetrieveSettings) -> None:
    """Raise `UsageError` where the pool cannot be searched, or its images not be had, in the way that is asked for."""
    if pool.dim != clip.embed_dim or pool.model not in (clip.name, "unknown"):
        raise UsageError(
            f"{pool.folder} holds {pool.dim}-d embeddings of model {pool.model!r}, but {clip.name!r} gives {clip.embed_dim}; "
            "search a pool with the model that embedded it"
        )
    if settings.fetch == "shards" and any(shard.images is None for shard in pool.shards):
        raise UsageError(f"{pool.folder}: no images/ shards; set retrieve.fetch=http to download them")
    for modality in settings.modalities:
        pool.embeddings(pool.shards[0], modality)
    if settings.engine == "index":
        from retrieve_or_generate.pool.index import load_recipe

        recipe = load_recipe(settings.index)
        if set(settings.modalities) != {recipe.modality}:
            raise UsageError(
                f"index recipe {recipe.name!r} is over {recipe.modality} embeddings; "
                f"set retrieve.modalities=[{recipe.modality}], or retrieve.engine=scan"
            )


def find_candidates(
    task: Task, pool: Pool, clip: Clip, settings: RetrieveSettings, index_folder: Path | None = None
) -> pa.Table:
    """The best `candidates_per_class` rows of each class (`CANDIDATES`), ordered by row; a row is of one class only.

    A row found for several classes goes to the one it scores best for.
    """
    queries = class_queries(task, clip)
    pairs = [np.zeros((0, 2), np.int64)]
    if settings.strategy != "substring":
        pairs += [_neighbours(pool, queries, modality, settings, index_folder) for modality in settings.modalities]
    names: dict[tuple[int, int], str] = {}
    if settings.strategy != "semantic":
        names = _named(task, pool, settings)
        pairs.append(np.array(list(names), np.int64).reshape(-1, 2))
    rows, labels = np.unique(np.concatenate(pairs), axis=0).T
    scores, best = best_queries(pool, queries, rows, labels, settings.modalities)
    chosen = _chosen(rows, labels, scores, settings.candidates_per_class)
    by_meaning = {tuple(pair) for part in pairs[: len(pairs) - bool(names)] for pair in part.tolist()}
    told = [
        queries.texts[q] if (pair := (int(row), int(label))) in by_meaning else names[pair]
        for row, label, q in zip(rows[chosen], labels[chosen], best[chosen], strict=True)
    ]
    return pa.table([rows[chosen], labels[chosen], scores[chosen], told], schema=CANDIDATES)


def _neighbours(
    pool: Pool, queries: Queries, modality: Modality, settings: RetrieveSettings, index_folder: Path | None
) -> np.ndarray:
    """(n, 2) rows and labels among the k nearest of any query."""
    if settings.engine == "scan":
        _, found = scan(queries.features, (pool.embeddings(shard, modality) for shard in pool.shards), settings.k)
    else:
        from retrieve_or_generate.pool.index import build_index, load_recipe, search_index

        recipe = load_recipe(settings.index)
        folder = build_index(pool, recipe, index_folder or pool.folder / "indices" / recipe.name)
        _, found = search_index(folder, pool, queries.features, settings.k)
    labels = np.broadcast_to((np.arange(len(found)) // queries.templates)[:, None], found.shape)
    return np.stack([found[found >= 0], labels[found >= 0]], axis=1)


def _named(task: Task, pool: Pool, settings: RetrieveSettings) -> dict[tuple[int, int], str]:
    """Rows and labels whose caption has the class name, and the name."""
    names = {label: [name] for label, name in enumerate(task.class_names)}
    captions = pool.metadata(columns=("caption",))["caption"]
    found = match_captions(captions, names, settings.caption_semantics).to_pydict()
    return {(row, label): query for row, label, query in zip(*found.values(), strict=True)}


def best_queries(
    pool: Pool, queries: Queries, rows: np.ndarray, labels: np.ndarray, modalities: Sequence[Modality]
) -> tuple[np.ndarray, np.ndarray]:
    """For each (row, label): the best score over the label's queries, (n,) float32, and which query, (n,) int64."""
    asked = queries.of(labels)
    distinct, place = np.unique(rows, return_inverse=True)
    places = np.repeat(place, queries.templates)
    total = np.zeros(asked.shape, np.float64)
    for modality in modalities:
        embeddings = vectors(pool, modality, distinct)
        total += pair_scores(queries.features, embeddings, asked.ravel(), places).reshape(asked.shape)
    scores = (total / len(modalities)).astype(np.float32)
    best = scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    at = np.arange(len(scores))
    return scores[at, best], asked[at, best]


def _chosen(rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, per_class: int) -> np.ndarray:
    """Places of the pairs that stay, ordered by row: each row's best label, each label's best rows."""
    order = np.lexsort((labels, -scores, rows))
    first = np.ones(len(order), bool)
    first[1:] = rows[order][1:] != rows[order][:-1]
    best = order[first]
    by_class = best[np.lexsort((rows[best], -scores[best], labels[best]))]
    rank = np.arange(len(by_class)) - np.searchsorted(labels[by_class], labels[by_class])
    kept = by_class[rank < per_class]
    return kept[np.argsort(rows[kept])]
