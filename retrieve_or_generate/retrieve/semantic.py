"""Candidates for a task's classes out of what a search found, by meaning and by name.

Takes a pool, the queries and the rows that were found; gives rows of the pool, each for one class, with a score and the query that
found it. A candidate's score is the cosine of its best query, averaged over the embeddings searched, however the candidate was
found. Where example images were asked for as well, it is the mean of the best template's and the best example's: images lie
closer to images than any text does, and would win every comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from retrieve_or_generate.pool.exact import pair_scores
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.pool.vectors import vectors
from retrieve_or_generate.retrieve.queries import Queries
from retrieve_or_generate.retrieve.search import Found
from retrieve_or_generate.settings import RetrieveSettings
from retrieve_or_generate.tasks.base import Task

CANDIDATES = pa.schema([("row", pa.int64()), ("label", pa.int64()), ("score", pa.float32()), ("query", pa.string())])

_SCORED = 1 << 20  # scores computed at a time


def find_candidates(task: Task, pool: Pool, queries: Queries, found: Found, settings: RetrieveSettings) -> pa.Table:
    """The best `candidates_per_class` rows of each class (`CANDIDATES`), ordered by row; a row is of one class only.

    A row found for several classes goes to the one it scores best for.
    """
    classes = len(task.class_names)
    by_meaning, by_name = _pairs(found.neighbours, classes), _pairs(found.captions, classes)
    pairs = np.union1d(by_meaning, by_name)
    rows, labels = pairs // classes, pairs % classes
    scores, best = best_queries(pool, queries, rows, labels, settings.modalities)
    chosen = chosen_pairs(rows, labels, scores, settings.candidates_per_class)
    said = np.isin(pairs[chosen], by_meaning)
    told = [queries.told(places) for places in best[chosen]]
    if found.captions is not None:
        names = found.captions["query"].take(np.searchsorted(by_name, pairs[chosen][~said])).to_pylist()
        for place, name in zip(np.flatnonzero(~said), names, strict=True):
            told[place] = name
    return pa.table([rows[chosen], labels[chosen], scores[chosen], told], schema=CANDIDATES)


def answered_candidates(found: Found, settings: RetrieveSettings) -> pa.Table:
    """The best `candidates_per_class` rows of each class as a service scored them, with the columns of `search.ANSWERED`."""
    assert found.neighbours is not None
    rows, labels, scores = (found.neighbours[name].to_numpy() for name in ("row", "label", "score"))
    return found.neighbours.take(chosen_pairs(rows, labels, scores, settings.candidates_per_class))


def _pairs(table: pa.Table | None, classes: int) -> np.ndarray:
    """One ascending number for each row and label of a table in that order."""
    if table is None:
        return np.zeros(0, np.int64)
    return table["row"].to_numpy() * classes + table["label"].to_numpy()


def best_queries(
    pool: Pool, queries: Queries, rows: np.ndarray, labels: np.ndarray, modalities: Sequence[Modality]
) -> tuple[np.ndarray, np.ndarray]:
    """For each (row, label), rows ascending: the score, (n,) float32, and its best query of each kind, (n, kinds) int64."""
    kinds = len(queries.kinds)
    scores, best = np.zeros(len(rows), np.float32), np.zeros((len(rows), kinds), np.int64)
    step = max(_SCORED // queries.of_class.shape[1], 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        distinct, place = np.unique(rows[part], return_inverse=True)
        embeddings = [vectors(pool, modality, distinct) for modality in modalities]
        of_kind = [_best_of_kind(queries, kind[labels[part]], place, embeddings) for kind in queries.kinds]
        scores[part] = np.mean([score for score, _ in of_kind], axis=0)
        best[part] = np.stack([query for _, query in of_kind], axis=1)
    return scores, best


def _best_of_kind(
    queries: Queries, asked: np.ndarray, place: np.ndarray, embeddings: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float32 and int64: the best of the queries `asked` (n, m) for the embeddings at `place` (n,), and which it is."""
    places = np.repeat(place, asked.shape[1])
    total = np.zeros(asked.shape, np.float64)
    for vectors_ in embeddings:
        total += pair_scores(queries.features, vectors_, asked.ravel(), places).reshape(asked.shape)
    scores = (total / len(embeddings)).astype(np.float32)
    best, at = scores.argmax(1), np.arange(len(scores))
    return scores[at, best], asked[at, best]


def chosen_pairs(rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, per_class: int) -> np.ndarray:
    """Places of the pairs that stay, ordered by row: each row's best label, each label's best rows."""
    order = np.lexsort((labels, -scores, rows))
    first = np.ones(len(order), bool)
    first[1:] = rows[order][1:] != rows[order][:-1]
    best = order[first]
    by_class = best[np.lexsort((rows[best], -scores[best], labels[best]))]
    rank = np.arange(len(by_class)) - np.searchsorted(labels[by_class], labels[by_class])
    kept = by_class[rank < per_class]
    return kept[np.argsort(rows[kept])]
