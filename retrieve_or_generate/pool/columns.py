"""Columns of a pool's metadata under our names, whatever the files call them and whichever types they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError

ALIASES: dict[str, tuple[str, ...]] = {  # our name: the names it goes by, lower case, the one that counts first
    "url": ("url",),
    "caption": ("caption", "text", "alt_text"),
    "key": ("key", "image_path", "uid"),
    "NSFW": ("nsfw",),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "similarity": ("similarity", "clip_l14_similarity_score", "clip_b32_similarity_score"),
    "LICENSE": ("license",),
    "md5": ("md5",),
    "sha256": ("sha256",),
    "hash": ("hash",),
    "width": ("original_width", "width"),  # width is what a downloader made of it
    "height": ("original_height", "height"),
}
_NUMBERS = ("punsafe", "pwatermark", "similarity", "width", "height")
_TYPES = {**dict.fromkeys(ALIASES, pa.string()), **dict.fromkeys(_NUMBERS, pa.float64()), "hash": pa.int64()}


def row_hash(url: str | None, caption: str | None) -> int:
    """The stable id of a row, signed 64 bits, as LAION's own tables have it [laion-prepro: laion5B/safety/compute_hashes.py]."""
    return int(mmh3.hash64(((url or "") + (caption or "")).encode())[0])


def row_hashes(urls: pa.ChunkedArray, captions: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64: `row_hash` of each row."""
    texts = pc.binary_join_element_wise(urls.fill_null(""), captions.fill_null(""), "")
    return np.array([mmh3.hash64(text)[0] for text in texts.to_pylist()], np.int64)


def read_columns(path: Path, columns: Sequence[str], rows: np.ndarray | None = None) -> pa.Table:
    """Columns under our names, of `rows` (all of them if None) in their order; an absent column is null.

    Text is string, `hash` int64, other numbers float64, whatever the file holds. An absent `hash` is computed (`row_hash`). Only
    the row groups that hold `rows` are read. Raises `IntegrityError` naming a file that cannot be read.
    """
    try:
        return _read(path, columns, rows)
    except Exception as error:  # pyarrow answers damage with many types, UnicodeDecodeError among them
        raise IntegrityError(f"{path}: its columns cannot be read ({_in_a_line(error)})") from error


def count_rows(path: Path) -> int:
    """Rows of a table by its footer. Raises `IntegrityError` where there is none to be read."""
    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except Exception as error:  # as above
        raise IntegrityError(f"{path}: not a whole parquet file ({_in_a_line(error)})") from error


def column_of(file: pq.ParquetFile, *names: str) -> str | None:
    """The first of these names (lower case) that a column has, as the file spells it; None where there is none of them."""
    present = {name.lower(): name for name in reversed(file.schema_arrow.names)}
    return next((present[name] for name in names if name in present), None)


def _aliases(ours: str) -> tuple[str, ...]:
    return ALIASES.get(ours, (ours.lower(),))


def tells(path: Path, name: str) -> bool:
    """Whether a table has any value of a column under our name `name`, by its footer: where that is silent, it may."""
    with pq.ParquetFile(path) as file:
        theirs = column_of(file, *_aliases(name))
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    return theirs is not None and any(_nulls(group, theirs) != group.num_rows for group in groups)


def _nulls(group: pq.RowGroupMetaData, name: str) -> int | None:
    """Rows of a group without a value; None where the file does not say."""
    columns = (group.column(place) for place in range(group.num_columns))
    known = next((column.statistics for column in columns if column.path_in_schema == name), None)
    return int(known.null_count) if known is not None and known.has_null_count else None


def _in_a_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(path: Path, columns: Sequence[str], rows: np.ndarray | None) -> pa.Table:
    with pq.ParquetFile(path) as file:
        asked = dict.fromkeys([*columns, *(("url", "caption") if "hash" in columns else ())])
        found = {ours: column_of(file, *_aliases(ours)) for ours in asked}
        table = _read_groups(file, [theirs for theirs in dict.fromkeys(found.values()) if theirs], rows)
    arrays = {ours: _typed(table, ours, theirs) for ours, theirs in found.items()}
    if "hash" in columns and not found["hash"] and (found["url"] or found["caption"]):
        arrays["hash"] = pa.chunked_array([row_hashes(arrays["url"], arrays["caption"])])
    return pa.table({ours: arrays[ours] for ours in columns})


def _read_groups(file: pq.ParquetFile, columns: list[str], rows: np.ndarray | None) -> pa.Table:
    columns = columns or file.schema_arrow.names[:1]  # a table without columns has no length
    if rows is None:
        return file.read(columns=columns)
    sizes = np.array([file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)])
    first = np.cumsum(sizes) - sizes
    group = np.searchsorted(first, rows, side="right") - 1
    wanted = np.unique(group)
    shift = np.zeros(len(sizes), np.int64)  # from a row of the file to where it lies in what is read
    shift[wanted] = np.cumsum(sizes[wanted]) - sizes[wanted] - first[wanted]
    return file.read_row_groups(wanted.tolist(), columns=columns).take(rows + shift[group])


def _typed(table: pa.Table, ours: str, theirs: str | None) -> pa.ChunkedArray:
    kind = _TYPES.get(ours)
    if theirs is None:
        return pa.chunked_array([pa.nulls(table.num_rows, kind or pa.null())])
    table[theirs].validate(full=True)  # text that is not UTF-8 would fail far from the file
    return table[theirs].cast(kind) if kind is not None and table[theirs].type != kind else table[theirs]
