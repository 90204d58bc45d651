"""What looks for the neighbours of queries: the exact scan, a FAISS index, or a service; and which of them a search takes.

An `Engine` says which, what identifies it in a content key, and why it was taken. Scan and index give rows of the pool; a service
gives rows of its own, and says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.progress import Progress, bytes_of
from retrieve_or_generate.settings import RetrieveSettings, RowSettings, ServiceSettings
from retrieve_or_generate.store import LOCK

if TYPE_CHECKING:
    from retrieve_or_generate.pool.filters import RowFilter
    from retrieve_or_generate.pool.index import Index, IndexRecipe

EngineName = Literal["scan", "index", "remote"]


@dataclass(frozen=True)
class Engine:
    """How neighbours are looked for. `identity` goes into keys; `recipe` and `place` are of the FAISS index."""

    name: EngineName
    identity: dict[str, Any] = field(default_factory=dict)
    why: str = "asked for"
    recipe: IndexRecipe | None = None
    place: Path | None = None


def choose_engine(
    pool: Pool | None, settings: RetrieveSettings, queries: int, index_folder: Path | None = None, device: str = "cpu"
) -> Engine:
    """The engine that the settings ask for; for `auto`, the planner's.

    An index is that in `index_folder`, else the folder that the settings name, else the recipe's beside the pool. Raises
    `UsageError` for an index that is none or over other embeddings.
    """
    if settings.engine == "remote":
        return Engine("remote", settings.service.model_dump(mode="json"))
    assert pool is not None
    if settings.engine == "scan":
        return Engine("scan")
    if settings.engine == "auto" and len(settings.modalities) > 1:
        return Engine("scan", why="one index holds one kind of embeddings, and two are searched")
    index = _index_engine(pool, settings, index_folder)
    if settings.engine == "index":
        return index
    from retrieve_or_generate.pool.planner import plan

    [modality] = settings.modalities
    chosen = plan(pool, queries, settings.k, index.recipe, device, modality=modality, folder=index.place)
    return Engine("scan", why=chosen.why) if chosen.engine == "scan" else replace(index, why=chosen.why)


def _index_engine(pool: Pool, settings: RetrieveSettings, folder: Path | None) -> Engine:
    from retrieve_or_generate.pool.index import load_recipe, open_index

    named = Path(settings.index)
    is_recipe = named.suffix in (".yaml", ".yml") or not named.exists()
    recipe = load_recipe(settings.index) if is_recipe else None
    place = folder or (pool.folder / "indices" / recipe.name if recipe else named)
    there = open_index(place, pool, recipe) if _is_there(place) else None
    known = there.recipe if there else recipe
    assert known is not None
    if set(settings.modalities) != {known.modality}:
        raise UsageError(
            f"index {known.name!r} is over {known.modality} embeddings; "
            f"set retrieve.modalities=[{known.modality}], or retrieve.engine=scan"
        )
    identity = known.model_dump(mode="json", exclude={"name", "recall", "pool", "dim"})
    published = {"published": there.fingerprint} if there and not there.built else {}
    return Engine("index", identity | published, recipe=known, place=place)


def _is_there(place: Path) -> bool:
    """Whether an index lies there, ours or another's. A build of ours holds a lock and, once it is finished, a seal."""
    from retrieve_or_generate.pool.index import INDEX_SEAL

    return (place / INDEX_SEAL).is_file() or (place.exists() and not (place / LOCK).is_file())


def row_filter(pool: Pool, settings: RowSettings) -> RowFilter | None:
    """The filter of the settings; None where they leave all rows in."""
    from retrieve_or_generate.pool.filters import RowFilter

    return None if settings == RowSettings() else RowFilter(pool, settings)


def excluded(rows: RowFilter | None) -> dict[str, int]:
    """How many rows a filter left out for which reason, once all were looked at. Raises `UsageError` where none is left."""
    if rows is None:
        return {}
    rows.check_left()
    return rows.counts


def scan_neighbours(
    pool: Pool,
    settings: RetrieveSettings,
    xq: np.ndarray,
    state: Path,
    device: str,
    progress: Progress | None,
) -> tuple[dict[Modality, np.ndarray], dict[str, Any]]:
    """(q, k) rows among the embeddings of each kind, by one exact pass; and how they were found."""
    from retrieve_or_generate.pool.scan import scan_pool

    rows = row_filter(pool, settings.rows)
    told = bytes_of(progress, f"scanning {pool.name}")
    k = min(settings.k, pool.rows)  # memory goes with k
    found = scan_pool(pool, xq, k, settings.modalities, rows=rows, device=device, state=state, progress=told)
    facts = {"engine": "scan", "exact": True, "excluded": excluded(rows)}
    return {modality: found[modality][1] for modality in settings.modalities}, facts


def index_neighbours(
    pool: Pool,
    engine: Engine,
    settings: RetrieveSettings,
    xq: np.ndarray,
    sample: Callable[[], np.ndarray],
    device: str,
) -> tuple[dict[Modality, np.ndarray], dict[str, Any]]:
    """(q, k) rows that the index finds, and with which recall; it is built if it is not there.

    `sample` gives the (q, d) queries, a hundred at least, that the recall is measured with where nobody has.
    """
    from retrieve_or_generate.pool.index import build_index, open_index, search_index
    from retrieve_or_generate.pool.planner import known_recall

    assert engine.recipe is not None
    assert engine.place is not None
    if not _is_there(engine.place):
        build_index(pool, engine.recipe, engine.place)
    index: Index = open_index(engine.place, pool, engine.recipe)
    rows = row_filter(pool, settings.rows)
    recall = known_recall(index, pool, settings.k, sample, device=device)
    _, found = search_index(index, pool, xq, settings.k, allowed=rows.mask if rows else None)
    facts = {"engine": "index", "exact": False, "recall": recall.model_dump(mode="json")}
    return {index.recipe.modality: found}, facts | {"excluded": excluded(rows)}


def service_neighbours(
    service: ServiceSettings, xq: np.ndarray, k: int, modality: Modality, progress: Progress | None
) -> Sequence[Sequence[dict[str, Any]]]:
    """What a service finds for each query: rows of its own, with `id`, `similarity`, `url`, `caption` and `NSFW`."""
    from retrieve_or_generate.retrieve.remote import query_service

    assert service.url is not None
    tell = progress
    return query_service(
        service.url,
        embeddings=xq,
        k=k,
        modality=modality,
        index=service.index,
        aesthetic=service.aesthetic,
        deduplicate=service.deduplicate,
        safety=service.safety,
        violence=service.violence,
        progress=(lambda done, total: tell("asking the service", done, total)) if tell else None,
    )
