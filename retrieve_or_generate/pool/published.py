"""Indexes that others built: LAION's, or any that clip-retrieval serves, read where they lie and never written to.

Three forms: one file; a folder with `populated.index` and `merged_index.ivfdata`; a folder of numbered parts (`knn.index00`, …, or
`00.index`, …), whose lists are stacked without copying them. A folder with `image.index` or `text.index` in it is looked into.

Such files carry no checksum, and a damaged index may answer wrongly or end the process that reads it. So a file is first read in a
process of its own, with limits; what it holds is compared with the pool; and `rog index verify` measures what it finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool.faiss_files import INDEX, LISTS, inner_index, read_in_place, reason_of, untyped
from retrieve_or_generate.store import cache_folder, content_key, read_json, write_json

if TYPE_CHECKING:
    from retrieve_or_generate.pool.parts import Modality

_TRIAL_SECONDS = 1800  # a coarse quantiser of gigabytes on a slow disk; damage that loops for ever ends here
_PIECES, _PIECE = 64, 1 << 16
_LISTS_LOOKED_AT = 64


def index_files(path: Path, modality: Modality) -> tuple[Path, ...]:
    """The index files at `path`, in the order of their rows; `UsageError` where there are none."""
    inside = path / f"{modality}.index"
    if inside.exists():
        return index_files(inside, modality)
    if path.is_file():
        return (path,)
    if (path / INDEX).is_file():
        return (path / INDEX,)
    parts = _parts(path)
    if not parts:
        raise UsageError(
            f"{path}: no finished index; give a folder that rog index build wrote, or a published index: a file, a folder with "
            f"{INDEX} and {LISTS}, or one with parts knn.index00, knn.index01, …"
        )
    return parts


def published_modality(path: Path) -> Modality:
    """Of which embeddings an index is, by the names of clip-retrieval; of images where they do not tell."""
    text = path.name == "text.index" or ((path / "text.index").exists() and not (path / "image.index").exists())
    return "text" if text else "image"


def _parts(folder: Path) -> tuple[Path, ...]:
    """Files whose names differ by a number alone, counted from nought without a gap."""
    found = {}
    for path in folder.glob("*") if folder.is_dir() else ():
        digits = re.fullmatch(r"(?:knn\.index|index_part_)(\d+)|(\d+)\.index", path.name)
        if digits and path.is_file():
            found[int(digits[1] or digits[2])] = path
    missing = set(range(max(found, default=-1) + 1)) - set(found)
    if missing:
        raise IntegrityError(f"{folder}: part {min(missing)} of the index is missing ({len(found)} are there)")
    return tuple(found[number] for number in sorted(found))


def fingerprint(files: tuple[Path, ...]) -> str:
    """16 hex digits of sizes and sampled content: a file of hundreds of gigabytes is not read whole to be opened."""
    beside = [path.parent / LISTS for path in files if path.name == INDEX and (path.parent / LISTS).is_file()]
    return content_key([sampled(path) for path in (*files, *beside)])


def sampled(path: Path) -> list[int | str]:
    """Size, and the sha256 of evenly spaced pieces, the first and the last among them."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({max(0, (size - _PIECE) * piece // (_PIECES - 1)) for piece in range(_PIECES)}):
            file.seek(start)
            digest.update(file.read(_PIECE))
    return [size, digest.hexdigest()]


def read_published(files: tuple[Path, ...]) -> Any:
    """The index over all `files`, memory-mapped. Raises `IntegrityError` for a file that FAISS refuses."""
    indexes = []
    for path in files:
        try:
            indexes.append(read_in_place(path))
        except RuntimeError as error:
            raise IntegrityError(f"{path}: FAISS cannot read it ({reason_of(error)})") from None
    return indexes[0] if len(indexes) == 1 else _stacked(indexes, files)


def _stacked(indexes: list[Any], files: tuple[Path, ...]) -> Any:
    """The first index with the lists of all of them; the quantisers of the others are let go."""
    inner = [inner_index(index) for index in indexes]
    for path, one in zip(files, inner, strict=True):
        if not isinstance(one, faiss.IndexIVF) or (one.nlist, one.code_size) != (inner[0].nlist, inner[0].code_size):
            raise IntegrityError(f"{path}: not a part of the same index as {files[0].name}")
    _check_ids_run_on(inner, files)
    pointers = untyped.InvertedListsPtrVector()
    for one in inner:
        one.own_invlists = False
        pointers.push_back(one.invlists)
    stack = untyped.HStackInvertedLists(pointers.size(), pointers.data())
    whole = indexes[0]
    inner[0].replace_invlists(stack, True)
    stack.this.disown()
    whole.ntotal = inner[0].ntotal = sum(int(one.ntotal) for one in inner)
    return whole


def _check_ids_run_on(inner: list[Any], files: tuple[Path, ...]) -> None:
    """Parts can be stacked only where each counts its rows on from the one before; looked at in some lists of each."""
    first = 0
    for path, one in zip(files, inner, strict=True):
        ids = sampled_ids(one)
        if len(ids) and not first <= ids.min() <= ids.max() < first + one.ntotal:
            raise UsageError(
                f"{path}: its rows are numbered {ids.min()} to {ids.max()} and not on from {first}; merge the parts into one index "
                "with faiss.contrib.ondisk.merge_ondisk(…, shift_ids=True) first"
            )
        first += int(one.ntotal)


def sampled_ids(ivf: Any) -> np.ndarray:
    """(n,) int64 ids of some lists, spread over all."""
    lists, parts = ivf.invlists, [np.zeros(0, np.int64)]
    for number in np.unique(np.linspace(0, ivf.nlist - 1, _LISTS_LOOKED_AT).astype(int)).tolist():
        size = lists.list_size(number)
        if size:
            pointer = lists.get_ids(number)
            parts.append(faiss.rev_swig_ptr(pointer, size).copy())
            lists.release_ids(number, pointer)
    return np.concatenate(parts)


def try_reading(files: tuple[Path, ...], known: str) -> dict[str, int]:
    """`ntotal`, `dim`, `metric` and `nprobe` of an index, read and searched once in a process of its own.

    `known` is its fingerprint.

    Raises `IntegrityError` where that process fails, is killed, or does not end. What passed is remembered.
    """
    passed = cache_folder() / "indexes" / f"{known}.json"
    if passed.is_file():
        return dict(read_json(passed))
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", __name__, *map(str, files)]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise IntegrityError(f"{files[0]}: FAISS does not finish reading it; the file is damaged") from None
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        reason = said[-1] if said and ended.returncode > 0 else f"it ended the process with signal {-ended.returncode}"
        raise IntegrityError(reason if str(files[0].parent) in reason else f"{files[0]}: cannot be read ({reason})")
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    write_json(passed, found)
    return found


def _try_here(files: tuple[Path, ...]) -> dict[str, int]:
    """What the child process does: read within the machine's memory, look at ids, and search once."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    faiss.set_deserialization_vector_byte_limit(memory)
    index = read_published(files)
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        ids = sampled_ids(inner)
        if len(ids) and not 0 <= ids.min() <= ids.max() < index.ntotal:
            raise IntegrityError(f"{files[0]}: rows are numbered {ids.min()} to {ids.max()}, of {index.ntotal}")
    index.search(np.ones((1, index.d), np.float32) / np.float32(index.d**0.5), min(10, max(index.ntotal, 1)))
    nprobe = int(inner.nprobe) if isinstance(inner, faiss.IndexIVF) else 1
    return {"ntotal": int(index.ntotal), "dim": int(index.d), "metric": int(index.metric_type), "nprobe": nprobe}


if __name__ == "__main__":
    try:
        print(json.dumps(_try_here(tuple(map(Path, sys.argv[1:])))))
    except (UsageError, RuntimeError, MemoryError) as failure:
        sys.exit(
            str(failure)
            if isinstance(failure, UsageError)
            else f"{sys.argv[1]}: {reason_of(failure) if str(failure) else 'out of memory'}"
        )
