"""What looks for the neighbours of queries: the exact scan, a FAISS index, or a service; and which of them a search takes.

An `Engine` says which, what identifies it in a content key, and why it was chosen. All give, for each query, rows of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import RetrieveSettings
from retrieve_or_generate.pool.layout import Pool

EngineName = Literal["scan", "index", "remote"]


@dataclass(frozen=True)
class Engine:
    """How neighbours are looked for. `identity` goes into keys; `index` is where the FAISS index lies or is built."""

    name: EngineName
    identity: dict[str, Any]
    why: str
    index: Path | None = None


def choose_engine(pool: Pool, settings: RetrieveSettings, index_folder: Path | None) -> Engine:
    """The engine that the settings ask for. Raises `UsageError` for an index that is none or over other embeddings."""
    if settings.engine == "scan":
        return Engine("scan", {}, "asked for")
    from retrieve_or_generate.pool.index import load_recipe

    recipe = load_recipe(settings.index)
    if set(settings.modalities) != {recipe.modality}:
        raise UsageError(
            f"index recipe {recipe.name!r} is over {recipe.modality} embeddings; "
            f"set retrieve.modalities=[{recipe.modality}], or retrieve.engine=scan"
        )
    folder = index_folder or pool.folder / "indices" / recipe.name
    return Engine("index", recipe.model_dump(mode="json"), "asked for", folder)
