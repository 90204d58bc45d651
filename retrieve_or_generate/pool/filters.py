"""Which rows of a pool may be found: bounds on what its metadata says of them, and lists of rows that may or may not.

Reads the metadata of one shard at a time. A row that is left out counts under one reason, the first that holds of: `blocked`,
`not_allowed`, `unknown` (the metadata lacks a number that is asked for), `unsafe`, `dissimilar`, `small`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool.columns import read_columns
from retrieve_or_generate.pool.layout import Pool, PoolShard
from retrieve_or_generate.pool.row_lists import KINDS, Keys, RowList
from retrieve_or_generate.settings import RowSettings
from retrieve_or_generate.store import content_key

_VERSION = 1  # part of the fingerprint: raise when the same settings leave out other rows


class RowFilter:
    """The rows of `pool` that `settings` allow.

    Raises `UsageError` for a list that cannot be read, and for settings that ask for what the pool does not record.
    """

    def __init__(self, pool: Pool, settings: RowSettings):
        self._pool, self._settings = pool, settings
        self._allow = tuple(RowList.load(path) for path in settings.allow)
        self._block = tuple(RowList.load(path) for path in settings.block)
        self.excluded: dict[str, dict[str, int]] = {}
        """Rows left out of each shard (its index as text) by reason, of the shards that `mask` was asked for."""
        self._told(pool.shards[0])

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out so far, by reason; a shard asked for twice counts once."""
        total: Counter[str] = Counter()
        for counts in self.excluded.values():
            total.update(counts)
        return dict(sorted(total.items()))

    def check_left(self) -> None:
        """Raise `UsageError` with the counts where not one row of the pool is left, once `mask` was asked for all of it."""
        if sum(self.counts.values()) == self._pool.rows:
            told = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
            raise UsageError(
                f"{self._pool.folder}: retrieve.rows leaves out all of its {self._pool.rows} rows ({told}); leave some in"
            )

    @property
    def fingerprint(self) -> str:
        """16 hex digits: of the settings and of what the lists hold, not of where they lie."""
        bounds = self._settings.model_dump(mode="json", exclude={"allow", "block"})
        lists = [sorted(one.fingerprint for one in many) for many in (self._allow, self._block)]
        return content_key([_VERSION, bounds, lists])

    def resume(self, excluded: dict[str, dict[str, int]]) -> None:
        """Count the shards of an earlier run, as its `excluded` has them."""
        self.excluded = {**excluded, **self.excluded}

    def mask(self, shard: PoolShard) -> np.ndarray | None:
        """(rows,) bool: False for the rows of `shard` that must not be found; None where all may."""
        table = self._told(shard)
        if table is None:
            return None
        numbers = {name: _number(table[name]) for name in table.column_names if name not in KINDS}
        keys = {name: KINDS[name](table[name]) for name in table.column_names if name in KINDS}
        kept = np.ones(shard.rows, bool)
        counts: dict[str, int] = {}
        for reason, bad in self._reasons(numbers, keys):
            if number := int((bad & kept).sum()):
                counts[reason] = counts.get(reason, 0) + number
            kept &= ~bad
        self.excluded[str(shard.index)] = counts
        return kept

    def _told(self, shard: PoolShard) -> pa.Table | None:
        """What the settings need to know of the rows of `shard`; None where they ask for nothing."""
        askers = self._askers()
        if not askers:
            return None
        table = read_columns(shard.metadata, tuple(askers))
        for name, asker in askers.items():
            if table[name].null_count == shard.rows:
                raise UsageError(f"{shard.metadata}: tells no {name}, which {asker} asks for; leave that setting out")
        return table

    def _askers(self) -> dict[str, str]:
        """Columns that the settings need, and which of them does."""
        settings, askers = self._settings, {}
        if settings.punsafe_below is not None:
            askers["punsafe"] = "rows.punsafe_below"
        if settings.similarity_from is not None:
            askers["similarity"] = "rows.similarity_from"
        if settings.least_side:
            askers |= dict.fromkeys(("width", "height"), "rows.least_side")
        for one in self._allow + self._block:
            askers |= dict.fromkeys(one.keys, one.path)
        return askers

    def _reasons(self, numbers: dict[str, np.ndarray], keys: dict[str, Keys]) -> Iterator[tuple[str, np.ndarray]]:
        """Each reason in its order, and (rows,) bool: the rows that it leaves out."""
        settings = self._settings
        for one in self._block:
            yield "blocked", one.holds(keys)
        if self._allow:
            yield "not_allowed", ~np.logical_or.reduce([one.holds(keys) for one in self._allow])
        if numbers:
            yield "unknown", np.logical_or.reduce([np.isnan(values) for values in numbers.values()])
        if settings.punsafe_below is not None:
            yield "unsafe", numbers["punsafe"] >= settings.punsafe_below
        if settings.similarity_from is not None:
            yield "dissimilar", numbers["similarity"] < settings.similarity_from
        if settings.least_side:
            yield "small", np.minimum(numbers["width"], numbers["height"]) < settings.least_side


def _number(values: pa.ChunkedArray) -> np.ndarray:
    """(rows,) float64, NaN where nothing is told."""
    return values.cast(pa.float64()).to_numpy(zero_copy_only=False)
