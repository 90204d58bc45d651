"""Which captions speak of which class: every term of every class looked for in one pass over the captions.

Takes captions, or a pool whose metadata has them, and what to look for (`tasks.queries`); gives pairs of row and label. What counts
as having a term is one of three semantics (`caption_text`); what looks for them is hyperscan or Aho–Corasick (`caption_engines`),
with equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.executors import Unit, run_units
from retrieve_or_generate.pool.columns import ALIASES, column_of
from retrieve_or_generate.pool.layout import Pool, PoolShard
from retrieve_or_generate.retrieve.caption_engines import EngineName
from retrieve_or_generate.retrieve.caption_search import Alternative, Search
from retrieve_or_generate.retrieve.caption_text import Semantics, atoms
from retrieve_or_generate.store import content_key, durable_file, read_seal, seal
from retrieve_or_generate.tasks.queries import CaptionQuery

MATCHES = pa.schema([("row", pa.int64()), ("label", pa.int64()), ("query", pa.string())])

_SLICE = 1 << 16  # captions searched at a time: a few MB of text, which the processor's cache holds
_VERSION = 1  # part of the key of what is kept: raise when the same captions give other pairs


def match_captions(
    captions: pa.ChunkedArray | pa.Array,
    queries: Mapping[int, CaptionQuery | Sequence[str]],
    semantics: Semantics = "substring",
    engine: EngineName | None = None,
) -> pa.Table:
    """One row (`MATCHES`) for every caption and label whose query it meets, in that order; `query` tells the first met alternative.

    `captions` are strings, null where there is none; `queries` maps a label to its query, or to names of which any one will do.
    Raises `UsageError` for unknown semantics and for a term without a letter or digit.
    """
    matcher = Matcher.of(queries, semantics, engine)
    chunks = captions.chunks if isinstance(captions, pa.ChunkedArray) else [captions]
    return matcher.table(_slices(chunks))


def match_pool(
    pool: Pool,
    queries: Mapping[int, CaptionQuery | Sequence[str]],
    semantics: Semantics = "substring",
    progress: Callable[[int, int], None] | None = None,
    *,
    state: Path | None = None,
    jobs: int = 1,
) -> pa.Table:
    """`match_captions` over a pool, shard by shard: `row` is the pool's. `progress` is told rows done and rows in all.

    With a folder `state` what a shard gave is kept there, sealed, as soon as it is known: a second call does only what is missing,
    and the table lies in those files, mapped into memory. Without it, the pairs are held in memory; the captions never are.
    Raises `UsageError` for a pool without captions and `IntegrityError` for a metadata file that cannot be read.
    """
    matcher = Matcher.of(queries, semantics)
    units = [Unit(f"captions of {shard.metadata.name}", shard, shard.rows) for shard in pool.shards]
    key = content_key([_VERSION, pool.fingerprint, matcher.described]) if state else ""
    work = partial(_shard_matcher, matcher, state, key)
    tables: dict[int, pa.Table] = {}
    done = 0
    for unit, found in run_units(units, work, jobs):
        shard = unit.payload
        tables[shard.index] = found if isinstance(found, pa.Table) else _mapped(found)
        done += shard.rows
        if progress:
            progress(done, pool.rows)
    return pa.concat_tables(tables[shard.index] for shard in pool.shards)


@dataclass(frozen=True)
class Matcher:
    """Queries made ready to be looked for. Alternatives are ordered by label, then as listed."""

    alternatives: tuple[Alternative, ...]
    semantics: Semantics
    engine_name: EngineName | None = None

    @classmethod
    def of(
        cls,
        queries: Mapping[int, CaptionQuery | Sequence[str]],
        semantics: Semantics,
        engine: EngineName | None = None,
    ) -> Matcher:
        if semantics not in get_args(Semantics):
            raise unknown_name("caption semantics", semantics, get_args(Semantics))
        listed = [
            Alternative(label, " + ".join(terms), _all_atoms(terms, semantics))
            for label, query in sorted(queries.items())
            for terms in (query if isinstance(query, CaptionQuery) else CaptionQuery.any_of(query)).alternatives()
        ]
        return cls(tuple(listed), semantics, engine)

    @property
    def described(self) -> list[object]:
        """All that decides what is found, as JSON."""
        return [self.semantics, [[a.label, a.told, [atom.decode() for atom in a.atoms]] for a in self.alternatives]]

    def table(self, slices: Iterator[tuple[int, pa.Array]]) -> pa.Table:
        """`MATCHES` of captions that come as slices, each with the row of its first."""
        batches = [pa.Table.from_batches([], MATCHES)]
        for first, captions in slices:
            rows, places = self._search.pairs(captions)
            labels, told = self._search.labels[places], self._search.told.take(pa.array(places))
            batches.append(pa.table([rows + first, labels, told], schema=MATCHES))
        return pa.concat_tables(batches)

    @cached_property
    def _search(self) -> Search:
        return Search(self.alternatives, self.semantics, self.engine_name)


def _all_atoms(terms: Sequence[str], semantics: Semantics) -> tuple[bytes, ...]:
    for term in terms:
        if not any(character.isalnum() for character in term):
            raise UsageError(f"class name {term!r} has no letter or digit, so no caption can be matched with it")
    return tuple(dict.fromkeys(atom for term in terms for atom in atoms(term, semantics)))


def _slices(chunks: Sequence[pa.Array]) -> Iterator[tuple[int, pa.Array]]:
    first = 0
    for chunk in chunks:
        for start in range(0, len(chunk), _SLICE):
            yield first + start, chunk.slice(start, _SLICE)
        first += len(chunk)


def _captions(shard: PoolShard) -> Iterator[tuple[int, pa.Array]]:
    """A shard's captions, each part with the pool's row of its first; no more than a part is in memory."""
    row = shard.first_row
    try:
        file = pq.ParquetFile(shard.metadata)
        column = column_of(file, *ALIASES["caption"])
        if column is None:
            raise UsageError(f"{shard.metadata}: no caption column; search this pool with retrieve.strategy=semantic")
        pa.nulls(0, file.schema_arrow.field(column).type).cast(pa.large_string())  # raises for what is no text
        for batch in file.iter_batches(_SLICE, columns=[column], use_threads=False):
            yield row, batch.column(0)
            row += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{shard.metadata}: its captions cannot be read ({error})") from error
    if row != shard.first_row + shard.rows:
        raise IntegrityError(f"{shard.metadata}: {row - shard.first_row} captions, but {shard.rows} rows were expected")


def _shard_matcher(matcher: Matcher, state: Path | None, key: str) -> Callable[[PoolShard], pa.Table | Path]:
    """What matches one shard: to a table, or to a sealed file in `state`."""

    def match(shard: PoolShard) -> pa.Table | Path:
        if state is None:
            return matcher.table(_captions(shard))
        path, name = state / f"captions-{shard.index:05d}.arrow", f"captions-{shard.index:05d}.json"
        if not _kept(state, name, key):
            with durable_file(path) as temporary, pa.ipc.new_file(str(temporary), MATCHES) as writer:
                writer.write_table(matcher.table(_captions(shard)))
            seal(state, name, key, [path])
        return path

    return match


def _kept(state: Path, name: str, key: str) -> bool:
    """Whether a shard's pairs are there and whole; damaged ones are looked for anew."""
    try:
        return read_seal(state, name, key) is not None
    except IntegrityError:
        return False


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
