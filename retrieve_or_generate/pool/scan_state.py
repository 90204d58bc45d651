"""Where a pass over a pool stands, kept so that a killed one goes on: the best rows so far after a number of shards.

A folder holds `best-000012.npz` (D and I for every modality, after 12 shards) and, written after it, the seal `scan.json` that
names it. A new file never replaces the one that the seal names; that one goes when the new seal stands.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool.layout import Modality
from retrieve_or_generate.pool.nearest import Found
from retrieve_or_generate.store import durable_file, locked, read_seal, remove_leftovers, seal

SEAL = "scan.json"
_PAUSE = 20  # shards pass without being kept until keeping costs one part in so many of the time

Counts = dict[str, dict[str, int]]


class ScanState:
    """The state of the pass named `key` in `folder`; without a folder nothing is kept. Use it as a context: it holds the folder.

    Raises `UsageError` where the folder holds another pass, `IntegrityError` where its files changed since they were written.
    """

    def __init__(self, folder: Path | None, key: str):
        self._folder, self._key = folder, key
        self._kept_at, self._cost = float("-inf"), 0.0

    @contextmanager
    def held(self) -> Iterator[ScanState]:
        with locked(self._folder) if self._folder else nullcontext():
            yield self

    def load(self) -> tuple[int, dict[Modality, Found], Counts] | None:
        """Shards done, the answers by modality, and the filter's counts by shard; None where nothing was kept yet."""
        if self._folder is None:
            return None
        if (self._folder / SEAL).is_file() and read_seal(self._folder, SEAL, self._key, verify=False) is None:
            raise UsageError(
                f"{self._folder}: holds a scan of other queries, rows or pool; choose another folder or delete it"
            )
        remove_leftovers(self._folder)
        record = read_seal(self._folder, SEAL, self._key)
        if record is None:
            return None
        [name] = record["files"]
        self._forget_but(name)
        with np.load(self._folder / name, allow_pickle=False) as arrays:
            there: list[Modality] = [one for one in get_args(Modality) if f"D_{one}" in arrays]
            found = {one: (arrays[f"D_{one}"], arrays[f"I_{one}"]) for one in there}
        return record["shards"], found, record["excluded"]

    def is_due(self) -> bool:
        return self._folder is not None and time.monotonic() - self._kept_at >= _PAUSE * self._cost

    def keep(self, shards: int, found: Mapping[Modality, Found], excluded: Counts) -> None:
        if self._folder is None:
            return
        started = time.monotonic()
        arrays: dict[str, Any] = {}
        for name, (D, I) in found.items():  # noqa: E741  FAISS's names
            arrays |= {f"D_{name}": D, f"I_{name}": I}
        path = self._folder / f"best-{shards:06d}.npz"
        with durable_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        seal(self._folder, SEAL, self._key, [path], shards=shards, excluded=excluded)
        self._forget_but(path.name)
        self._kept_at = time.monotonic()
        self._cost = self._kept_at - started

    def _forget_but(self, name: str) -> None:
        for path in self._folder.glob("best-*.npz") if self._folder else ():
            if path.name != name:
                path.unlink()
