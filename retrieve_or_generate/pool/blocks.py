"""Blocks of a shard's rows where they are worked on, the next one read while one is worked on.

A mapped file is read by plain reads, not through its mapping: faster, countable in memory, and a file that was cut short is an
error instead of a signal that ends the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class BlockReader:
    """Two buffers of `rows` × `dim` float16 on `device`; for a GPU two more in pinned memory, from where they are copied.

    Blocks are padded to a `multiple` of rows, `padded` of them at most; what the padding holds is unspecified.
    """

    def __init__(self, rows: int, dim: int, device: torch.device, multiple: int):
        self.rows, self.dim, self.multiple = rows, dim, multiple
        self.padded = -(-rows // multiple) * multiple
        shape = (self.padded, dim)
        self._gpu = device.type == "cuda"
        self._host = [torch.zeros(shape, dtype=torch.float16, pin_memory=self._gpu) for _ in range(2)]
        self._blocks = [buffer.to(device) if self._gpu else buffer for buffer in self._host]
        self._stream = torch.cuda.Stream(device) if self._gpu else None

    def read(self, shard: np.ndarray, allowed: np.ndarray | None) -> Iterator[tuple[Tensor, np.ndarray, int]]:
        """For every `rows` rows of `shard`: those allowed as (n + padding, dim) float16, their n numbers, and where it ended.

        A block is valid until the next one is asked for. Raises ValueError for shapes that do not fit and a file cut short.
        """
        self._check(shard, allowed)
        starts = range(0, len(shard), self.rows)
        with _File(shard) as file, ThreadPoolExecutor(1, thread_name_prefix="blocks") as reader:
            ahead = [reader.submit(self._load, file, len(shard), allowed, start, 0) for start in starts[:1]]
            for number, start in enumerate(starts):
                block = ahead.pop().result()
                if self._gpu:
                    torch.cuda.current_stream(self._blocks[0].device).synchronize()  # the other buffer is free again
                if start + self.rows < len(shard):
                    following = start + self.rows, 1 - number % 2
                    ahead.append(reader.submit(self._load, file, len(shard), allowed, *following))
                yield *block, min(start + self.rows, len(shard))

    def _check(self, shard: np.ndarray, allowed: np.ndarray | None) -> None:
        if shard.ndim != 2 or shard.shape[1] != self.dim or shard.dtype != np.float16:
            raise ValueError(f"a shard is (n, {self.dim}) float16 like the queries, not {shard.shape} {shard.dtype}")
        if allowed is not None and (allowed.shape != (len(shard),) or allowed.dtype != np.bool_):
            raise ValueError(f"a mask is ({len(shard)},) bool like its shard, not {allowed.shape} {allowed.dtype}")

    def _load(
        self, file: _File, end: int, allowed: np.ndarray | None, start: int, buffer: int
    ) -> tuple[Tensor, np.ndarray]:
        stop = min(start + self.rows, end)
        rows = np.arange(start, stop) if allowed is None else start + np.flatnonzero(allowed[start:stop])
        block = self._blocks[buffer][: -(-len(rows) // self.multiple) * self.multiple]
        if len(rows):
            host = self._host[buffer].numpy()
            file.read(start, host[: stop - start])
            if len(rows) < stop - start:
                host[: len(rows)] = host[rows - start]
            self._to_device(block, buffer)
        return block, rows

    def _to_device(self, block: Tensor, buffer: int) -> None:
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                block.copy_(self._host[buffer][: len(block)], non_blocking=True)
            self._stream.synchronize()


class _File:
    """Rows of a shard, read from its file where it maps the whole of one."""

    def __init__(self, shard: np.ndarray):
        self._shard = shard
        self._file: FileIO | None = None
        self._start, self._stride = 0, shard.strides[0]
        mapping: object = shard.base  # of a part of a mapped array it is that array
        if isinstance(shard, np.memmap) and isinstance(mapping, mmap.mmap) and shard.flags.c_contiguous:
            self._file = Path(str(shard.filename)).open("rb", buffering=0)  # noqa: SIM115  closed on exit
            self._start = int(shard.offset)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def read(self, start: int, into: np.ndarray) -> None:
        """Fill `into` with the rows from `start` on."""
        if self._file is None:
            into[:] = self._shard[start : start + len(into)]
            return
        self._file.seek(self._start + start * self._stride)
        left = into.view(np.uint8).reshape(-1).data
        while left:
            taken = self._file.readinto(left)
            if not taken:
                raise ValueError("the file ends before its last row")
            left = left[taken:]


def take_rows(shard: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, dim) single `rows` of `shard`, in their order."""
    taken = np.empty((len(rows), shard.shape[1]), shard.dtype)
    with _File(shard) as file:
        for place, row in enumerate(rows.tolist()):
            file.read(row, taken[place : place + 1])
    return taken
