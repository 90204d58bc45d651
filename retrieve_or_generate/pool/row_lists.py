"""Lists of rows, from a handful to billions: ids, md5 or sha256 hashes, or URLs, looked up in sorted 64-bit keys on disk.

Reads text files (one entry a line; blank lines and those that begin with # are passed over), parquet files (the first of the
columns hash, md5, sha256, url that is there, whatever its case; `FILE#COLUMN` names another) or a folder of either. What is no
entry is refused, by its line or row; a row of a table without a value is passed over. Writes the keys, sorted, to the cache folder
under a key of the list's content, and maps them: memory stays bounded, a list is sorted once.

An entry's key is the id itself, the first 64 bits of a hash, or `mmh3.hash64` of a URL in one spelling. Of N rows looked up in a
list of M, about N·M/2⁶⁴ are taken for listed by chance: 0.2 of two billion in a list of two billion, as with LAION's own ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieve_or_generate.blocklist import spelled
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool.columns import column_of
from retrieve_or_generate.store import (
    TEMPORARY_PREFIX,
    cache_folder,
    content_key,
    durable_file,
    locked,
    read_seal,
    remove_leftovers,
    seal,
    sha256_of,
)

SEAL = "list.json"
_VERSION = 2  # part of the key: raise when the same list gives other keys
_BATCH = 1 << 18
_ID = re.compile(r"[+-]?\d{1,20}")

Keys = tuple[np.ndarray, np.ndarray]
"""(n,) uint64, and (n,) bool: False where the value is missing or none of its kind."""


def _id_keys(values: pa.ChunkedArray) -> Keys:
    known = values.is_valid().to_numpy()
    numbers = values.fill_null(0) if pa.types.is_integer(values.type) else values.cast(pa.int64()).fill_null(0)
    return numbers.to_numpy().astype(np.uint64, copy=False), known


def _digest_keys(digits: int, values: pa.ChunkedArray) -> Keys:
    text = values.cast(pa.string()).fill_null("")
    known = pc.match_substring_regex(text, f"^[0-9a-fA-F]{{{digits}}}$").to_numpy()
    first = pc.if_else(pa.chunked_array([known]), pc.utf8_slice_codeunits(text, 0, 16), "0" * 16)
    return np.frombuffer(bytes.fromhex("".join(first.to_pylist())), ">u8").astype(np.uint64), known


def _url_keys(values: pa.ChunkedArray) -> Keys:
    urls = values.cast(pa.string()).to_pylist()
    keys = [mmh3.hash64(spelled(url).encode(), signed=False)[0] if url else 0 for url in urls]
    return np.array(keys, np.uint64), np.array([bool(url) for url in urls], bool)


KINDS: dict[str, Callable[[pa.ChunkedArray], Keys]] = {
    "hash": _id_keys,
    "md5": partial(_digest_keys, 32),
    "sha256": partial(_digest_keys, 64),
    "url": _url_keys,
}
"""Columns of a pool that tell which row it is, and what makes keys of their values."""


@dataclass(frozen=True)
class RowList:
    """A list in its sorted form: (n,) uint64 keys of each kind of entry that it holds, ascending, mapped from disk."""

    path: str
    fingerprint: str
    keys: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: str) -> RowList:
        """The list in `path`, sorted on the first call. Raises `UsageError` for what is no list, naming file and line."""
        name, _, column = path.partition("#")
        files = _files(Path(name))
        key = content_key([_VERSION, column, [sha256_of(file) for file in files]])
        folder = cache_folder() / "lists" / key
        with locked(folder, wait=True):
            record = read_seal(folder, SEAL, key)
            if record is None:
                remove_leftovers(folder)
                record = _sort(folder, key, (entry for file in files for entry in _entries(file, column)), path)
        mapped: dict[str, np.ndarray] = {
            Path(one).stem: np.memmap(folder / one, np.uint64, "r") for one in record["files"]
        }
        return cls(path, key, mapped)

    def holds(self, keys: dict[str, Keys]) -> np.ndarray:
        """(n,) bool: rows of which any identity is listed. `keys` has every kind that the list has."""
        return np.logical_or.reduce([_listed(listed, *keys[kind]) for kind, listed in self.keys.items()])


def _listed(sorted_keys: np.ndarray, keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    order = np.argsort(keys)  # neighbours in the list follow each other: each page of it is touched once
    place = np.empty(len(keys), np.int64)
    place[order] = np.searchsorted(sorted_keys, keys[order])
    return known & (sorted_keys[np.minimum(place, len(sorted_keys) - 1)] == keys)


def _files(path: Path) -> list[Path]:
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(
            f"{path}: no such list of rows; give a text or parquet file of ids, hashes or URLs, or a folder of them"
        )
    return files


def _entries(path: Path, column: str) -> Iterator[tuple[str, np.ndarray]]:
    """Keys of the file's entries by kind, in batches."""
    try:
        yield from _of_parquet(path, column) if _is_parquet(path) else _of_text(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as a list of rows ({str(error).splitlines()[0]})") from error


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _of_parquet(path: Path, column: str) -> Iterator[tuple[str, np.ndarray]]:
    with pq.ParquetFile(path) as file:
        name = column_of(file, *([column.lower()] if column else KINDS))
        if name is None:
            wanted = f"column {column!r}" if column else f"one of the columns {', '.join(KINDS)}"
            raise UsageError(
                f"{path}: a list of rows in parquet has {wanted}; this file has {', '.join(file.schema_arrow.names)}"
            )
        row = 0
        for batch in file.iter_batches(_BATCH, columns=[name]):
            yield from _of_column(path, name.lower(), pa.chunked_array([batch.column(0)]), row)
            row += batch.num_rows


def _of_column(path: Path, name: str, values: pa.ChunkedArray, row: int) -> Iterator[tuple[str, np.ndarray]]:
    """Keys of a column's values, the first of which stands in row `row` of the file."""
    numbers = pa.types.is_integer(values.type)
    if pa.types.is_floating(values.type):
        raise UsageError(
            f"{path}: column {name} holds floating-point numbers, which have lost digits of ids; write integers"
        )
    if name in ("md5", "sha256", "url") or numbers:
        kind = name if name in KINDS else "hash"
        keys, known = KINDS[kind](values)
        _check_known(path, kind, values, known, row)
        yield kind, keys[known]
    else:
        told = ((row + place, value) for place, value in enumerate(values.to_pylist()) if value not in (None, ""))
        yield from _sorted_out(path, "row", told)


def _check_known(path: Path, kind: str, values: pa.ChunkedArray, known: np.ndarray, row: int) -> None:
    """Refuse the first value that is there and none of its kind."""
    given = pc.not_equal(values.cast(pa.string()), "").fill_null(False).to_numpy()
    wrong = np.flatnonzero(given & ~known)
    if len(wrong):
        value = str(values[int(wrong[0])].as_py())[:80]
        raise UsageError(f"{path}, row {row + wrong[0]}: {value!r} is no {kind}; correct it or leave it out")


def _of_text(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with path.open(encoding="utf-8") as file:
        lines = ((number, line.strip()) for number, line in enumerate(file, 1))
        entries = ((number, line) for number, line in lines if line and not line.startswith("#"))
        while batch := list(islice(entries, _BATCH)):
            yield from _sorted_out(path, "line", batch)


def _sorted_out(path: Path, counted: str, entries: Iterable[tuple[int, object]]) -> Iterator[tuple[str, np.ndarray]]:
    """Keys of entries of any kind; `UsageError` naming the place of what is none, `counted` in lines or rows."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for number, entry in entries:
        found[_kind(f"{path}, {counted} {number}", str(entry))].append(str(entry))
    for kind, values in found.items():
        if kind == "hash" and values:
            yield kind, np.array([int(value) % 2**64 for value in values], np.uint64)
        elif values:
            yield kind, KINDS[kind](pa.chunked_array([values]))[0]


def _kind(where: str, entry: str) -> str:
    if _ID.fullmatch(entry) and -(2**63) <= int(entry) < 2**64:
        return "hash"
    if re.fullmatch("[0-9a-fA-F]+", entry) and len(entry) in (32, 64):
        return "md5" if len(entry) == 32 else "sha256"
    if entry.lower().startswith(("http://", "https://")):
        return "url"
    raise UsageError(
        f"{where}: {entry[:80]!r} is neither an id (a whole number of 64 bits), nor an md5 (32 hex digits), "
        "a sha256 (64) or a URL"
    )


def _sort(
    folder: Path, key: str, entries: Iterable[tuple[str, np.ndarray]], named: str
) -> dict[str, dict[str, object]]:
    """Write `KIND.u64` for every kind, sorted and without repeats, in the memory of one part in 256; the seal."""
    with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder) as scratch:
        kinds = {kind for kind, keys in entries if _spread(Path(scratch) / kind, keys)}
        if not kinds:
            raise UsageError(f"{named}: a list of rows without an entry; give one with entries, or leave it out")
        for kind in sorted(kinds):
            with durable_file(folder / f"{kind}.u64") as temporary, temporary.open("wb") as file:
                for part in sorted((Path(scratch) / kind).iterdir()):
                    np.unique(np.fromfile(part, np.uint64)).tofile(file)
    return seal(folder, SEAL, key, [folder / f"{kind}.u64" for kind in kinds])


def _spread(folder: Path, keys: np.ndarray) -> int:
    """Append keys to one file for each of the 256 values of their first byte; how many there were."""
    if not len(keys):
        return 0
    folder.mkdir(exist_ok=True)
    keys = np.sort(keys)
    parts, starts = np.unique(keys >> np.uint64(56), return_index=True)
    for part, own in zip(parts.tolist(), np.split(keys, starts[1:]), strict=True):
        with (folder / f"{part:03d}").open("ab") as file:
            own.tofile(file)
    return len(keys)
