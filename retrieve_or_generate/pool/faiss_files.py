"""FAISS's own files and types: indexes read where they lie, merged on disk, and asked without changing them.

Loads faiss and numpy and nothing heavier, because files of unknown origin are first read in a process of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retrieve_or_generate.store import durable_file

INDEX, LISTS = "populated.index", "merged_index.ivfdata"  # as LAION published them
untyped: Any = faiss  # its type stubs do not know the keyword arguments that it takes
_IN_PLACE = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY


def reason_of(error: Exception) -> str:
    """The last line of what FAISS says: the one that tells."""
    return str(error).strip().splitlines()[-1]


def inner_index(index: Any) -> Any:
    """What lies below the transforms."""
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def lists_on_disk(index: Any) -> bool:
    """Whether its vectors lie in inverted lists that FAISS can leave on disk and merge there."""
    inner = inner_index(index)
    if not isinstance(inner, faiss.IndexIVF):
        return False
    lists = untyped.downcast_InvertedLists(inner.invlists)
    return isinstance(lists, faiss.ArrayInvertedLists | faiss.OnDiskInvertedLists)


def read_in_place(path: Path) -> Any:
    """An index whose lists stay on disk: in its own file, or in the data file beside a `populated.index`."""
    beside = path.name == INDEX and (path.parent / LISTS).is_file()
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY if beside else _IN_PLACE
    with _silent():
        return faiss.read_index(str(path), flags)


def mapped_lists(path: Path) -> Any:
    """Inverted lists that `write_lists` wrote, left in their file."""
    return faiss.read_InvertedLists(faiss.FileIOReader(str(path)), _IN_PLACE)


def write_lists(index: Any, path: Path) -> None:
    """The inverted lists alone: a part of an index does not repeat its quantisers."""
    writer = faiss.FileIOWriter(str(path))
    faiss.write_InvertedLists(inner_index(index).invlists, writer)
    del writer  # closes the file


def merge_lists(index: Any, parts: Sequence[Any], out: Path) -> None:
    """Write `populated.index` and `merged_index.ivfdata` to `out`: the trained, empty `index` with all lists of `parts`.

    What `faiss.contrib.ondisk.merge_ondisk` does, durably, and with the data file named as it lies beside the index, so that the
    bytes do not depend on the folder. `index` is used up.
    """
    inner = inner_index(index)
    pointers = untyped.InvertedListsPtrVector()
    for part in parts:
        pointers.push_back(part)
    with durable_file(out / LISTS) as temporary, _silent():
        lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(temporary))
        total = lists.merge_from_multiple(pointers.data(), pointers.size())
        lists.filename = LISTS
        inner.replace_invlists(lists, False)
        index.ntotal = inner.ntotal = total
        with durable_file(out / INDEX) as populated:
            faiss.write_index(index, str(populated))
        inner.invlists = None  # else both would free them
        del lists


def search_parameters(index: Any, nprobe: int, bits: np.ndarray | None) -> Any:
    """Search parameters for this call, through a pre-transform if there is one; None where there is nothing to say.

    `bits`: one a row, for `faiss.IDSelectorBitmap`, 0 where it must not be found. Raises ValueError where FAISS cannot do that.
    """
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        below = search_parameters(inner.index, nprobe, bits)
        return below and untyped.SearchParametersPreTransform(index_params=below)
    selector = None if bits is None else untyped.IDSelectorBitmap(bits)
    if isinstance(inner, faiss.IndexIVF):
        lists = min(nprobe, inner.nlist)
        graph = isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexHNSW)
        coarse = untyped.SearchParametersHNSW(efSearch=max(16, 2 * lists)) if graph else None
        return untyped.SearchParametersIVF(nprobe=lists, sel=selector, quantizer_params=coarse)
    if selector is None:
        return None
    if isinstance(inner, faiss.IndexHNSW):
        return untyped.SearchParametersHNSW(sel=selector, efSearch=int(inner.hnsw.efSearch))
    if isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return untyped.SearchParameters(sel=selector)
    raise ValueError(f"FAISS cannot leave rows out of a {type(inner).__name__}; use an IVF, HNSW or Flat index")


@contextmanager
def _silent() -> Iterator[None]:
    """FAISS prints about files to stdout, where results go."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
