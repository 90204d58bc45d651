"""How an index is built and searched: the recipes of `indexes/NAME.yaml`, and what was measured of an index.

A recipe names a pool, the model that embedded it, what is indexed, `faiss.index_factory`'s string and the lists to visit.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.pool.layout import Modality, Pool
from retrieve_or_generate.store import content_key
from retrieve_or_generate.yaml_files import read_mapping, validated

RECIPES = Path(__file__).parents[1] / "indexes"
LEAST_QUERIES = 100
_VERSION = 2  # part of the key: raise when the same recipe gives another index


class Recall(BaseModel):
    """The mean share of the true k nearest that an index found; in a recipe, with the recipe's own nprobe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    k: int = Field(ge=1)
    queries: int = Field(ge=LEAST_QUERIES)
    recall_at_k: float = Field(ge=0, le=1, description="share of the true k that was found")


class Measured(Recall):
    """A recall that was measured of one index, visiting `nprobe` lists a query."""

    nprobe: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.recall_at_k:.1%} of the true {self.k} nearest, measured over {self.queries} queries"


class IndexRecipe(BaseModel):
    """How an index is built and searched; what it indexes and how good it turned out."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    name: str
    pool: str
    model: str = Field(description="embedding model of the pool")
    dim: int | None = Field(None, ge=1, description="of the embeddings; any where left out")
    modality: Modality
    factory_string: str = Field(description="for faiss.index_factory")
    nprobe: int = Field(ge=1, description="lists visited per query")
    train_rows: int = Field(ge=1, description="rows that the quantisers are trained on, drawn by seed")
    seed: int = 0
    recall: tuple[Recall, ...] = Field((), description="as measured; empty where nobody has")

    def key(self, pool: Pool) -> str:
        """What the index files follow from; nprobe and recall are about searching them."""
        return content_key([_VERSION, pool.fingerprint, self.model_dump(exclude={"name", "nprobe", "recall", "dim"})])

    def check(self, pool: Pool) -> None:
        """Raise `UsageError` where this recipe is for another pool. One that records no name and model is taken on trust."""
        for what, wanted, there in (("pool", self.pool, pool.name), ("model", self.model, pool.model)):
            if pool.model != "unknown" and wanted != there:
                raise UsageError(
                    f"index recipe {self.name!r} is for {what} {wanted!r}, but {pool.folder} is of {there!r}; "
                    f"give a recipe file of your own that says {what}: {there}"
                )
        if self.dim not in (None, pool.dim):
            raise UsageError(
                f"index recipe {self.name!r} is for {self.dim}-d embeddings, but those of {pool.folder} have {pool.dim}"
            )
        pool.embeddings(pool.shards[0], self.modality)


def load_recipe(name: str) -> IndexRecipe:
    """A recipe by name (of those in `indexes/`) or by file; `UsageError` for an unknown name or key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise unknown_name("index recipe", name, (known.stem for known in RECIPES.glob("*.yaml")))
    return validated(IndexRecipe, {"name": path.stem, **read_mapping(path, "an index recipe")}, str(path))
