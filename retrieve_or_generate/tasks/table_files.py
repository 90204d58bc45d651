"""Tables on disk of which only what is asked for is read: Arrow streams are mapped into memory, parquet is read by row group."""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError


class TableFile(Protocol):
    """One file of a table."""

    path: Path
    schema: pa.Schema

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column; ask for small ones only."""

    def cell(self, name: str, row: int) -> Any: ...


def open_table(path: Path) -> TableFile:
    """The table in a `.parquet` or `.arrow` file; `IntegrityError` where it is none."""
    try:
        return _Parquet(path) if path.suffix == ".parquet" else _Arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's types by column, where it wrote the table; of ours none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: told for name, told in features.items() if isinstance(told, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


class _Arrow:
    def __init__(self, path: Path):
        self.path = path
        self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.schema = self._table.schema

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)

    def cell(self, name: str, row: int) -> Any:
        return self._table.column(name)[row].as_py()


class _Parquet:
    def __init__(self, path: Path):
        self.path = path
        self._file = pq.ParquetFile(path)
        self.schema = self._file.schema_arrow
        self._lock = Lock()
        self._held: tuple[tuple[str, int], Any] = (("", -1), None)

    @cached_property
    def _starts(self) -> np.ndarray:
        meta = self._file.metadata
        return np.cumsum([0, *(meta.row_group(group).num_rows for group in range(meta.num_row_groups))])

    def column(self, name: str) -> pa.ChunkedArray:
        return pq.read_table(self.path, columns=[name]).column(name)

    def cell(self, name: str, row: int) -> Any:
        """The row group of the last row is held, so rows in order cost one reading."""
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            which, column = self._held
            if which != (name, group):
                column = self._file.read_row_group(group, columns=[name]).column(name)
                self._held = (name, group), column
        return column[row - int(self._starts[group])].as_py()
