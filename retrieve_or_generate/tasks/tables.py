"""Images in tables: what `datasets.save_to_disk` writes (Arrow), what the Hugging Face Hub holds, and paths with labels (parquet).

A column of images is a path, bytes, or both as Hugging Face's `Image` is stored. A column of labels is numbers or words;
Hugging Face's `ClassLabel` says what its numbers are called.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.tasks.layout import Listing
from retrieve_or_generate.tasks.split import ChosenImages, ImageFiles, Images
from retrieve_or_generate.tasks.table_files import TableFile, features_of, open_table

_SHARD = re.compile(r"(.+?)(-\d+)?(-of-\d+)?")  # train-00000-of-00002
_IMAGE_NAMES = ("image", "img", "image_path", "path", "file", "file_name", "filename", "filepath")
_MOST_CLASSES = 1_000_000  # where numbers have no names, all below the largest are listed
_LABEL_NAMES = ("label", "labels", "class", "class_name", "target")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: found by their types and names. `split` is one whose value says of which split a row is."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TableImages(Images):
    """A column of several tables in a row; `starts` are their first rows. A path without bytes begins in `folder`."""

    tables: Sequence[TableFile]
    starts: np.ndarray
    column: str
    folder: Path

    def __len__(self) -> int:
        return int(self.starts[-1])

    def stored_in(self) -> Sequence[str]:
        return [str(table.path) for table in self.tables]

    def read(self, row: int) -> bytes:
        place = bisect_right(self.starts, row) - 1
        cell = self.tables[place].cell(self.column, row - int(self.starts[place]))
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        path = cell.get("path") if isinstance(cell, dict) else None
        if data is None and path:
            return ImageFiles([str(self.folder / path)]).read(0)
        if data is None:
            raise IntegrityError(f"{self.tables[place].path}: row {row - int(self.starts[place])}: no image")
        return bytes(data)


@dataclass(frozen=True)
class Tables:
    """A folder of tables, or one parquet file. A split is one or several files, a folder, or a value of a column."""

    place: Path
    columns: Columns = Columns()
    every_class: bool = False

    @property
    def where(self) -> str:
        return str(self.place)

    @cached_property
    def _tables(self) -> dict[str, list[TableFile]]:
        """The tables of each split; all of them under "" where a column tells splits apart."""
        files = [self.place] if self.place.is_file() else _saved(self.place) or sorted(self.place.rglob("*.parquet"))
        if not files:
            raise UsageError(f"{self.place}: neither what save_to_disk of Hugging Face writes nor parquet files")
        tables: dict[str, list[TableFile]] = {}
        for path in files:
            tables.setdefault("" if self.columns.split else _split_of(path), []).append(open_table(path))
        return tables

    def splits(self) -> list[str]:
        if not self.columns.split:
            return list(self._tables)
        values = _column(self._tables[""], self.columns.split, self.where)
        return sorted(str(value) for value in pc.unique(values).to_pylist())

    def labels(self, split: str) -> Sequence[str]:
        return self.listing(split).names

    def listing(self, split: str) -> Listing:
        tables = self._tables["" if self.columns.split else split]
        where = f"{self.where}/{split}"
        image = _found(tables[0], self.columns.image, "image", where, _holds_images, _IMAGE_NAMES)
        label = _found(tables[0], self.columns.label, "label", where, _holds_labels, _LABEL_NAMES)
        labels = _column(tables, label, where)
        keys, images = self._images(tables, image)
        if self.columns.split:
            rows = np.flatnonzero(pc.equal(_column(tables, self.columns.split, where).cast(pa.string()), split))
            keys, images, labels = [keys[row] for row in rows], ChosenImages(images, rows), labels.take(pa.array(rows))
        codes, names = _coded(labels, _called(tables[0], label), f"{where}: {label}")
        return Listing(keys, images, codes, names)

    def _images(self, tables: Sequence[TableFile], column: str) -> tuple[list[str], Images]:
        folder = self.place if self.place.is_dir() else self.place.parent
        if _is_text(tables[0].schema.field(column).type):
            paths = [path or "" for table in tables for path in table.column(column).to_pylist()]
            return paths, ImageFiles([str(folder / path) for path in paths])
        rows = [len(table.column(table.schema.names[0])) for table in tables]
        images = TableImages(tables, np.cumsum([0, *rows]), column, folder)
        return [f"{row:08d}" for row in range(len(images))], images


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that save_to_disk wrote, of one split or several, in their order."""
    files: list[Path] = []
    for state in sorted([*folder.glob("state.json"), *folder.glob("*/state.json")]):
        try:
            files += [state.parent / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{state}: not the record of save_to_disk ({error})") from error
    return files


def _split_of(path: Path) -> str:
    """`train` of train-00000-of-00002.parquet, train/0000.parquet and train/data-00000-of-00001.arrow."""
    shard = _SHARD.fullmatch(path.stem)
    named = shard[1] if shard else path.stem
    return path.parent.name if path.suffix == ".arrow" or named.isdigit() else named


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _holds_images(kind: pa.DataType) -> bool:
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return binary or _is_text(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _holds_labels(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_dictionary(kind)


def _found(
    table: TableFile,
    asked: str | None,
    what: str,
    where: str,
    fits: Callable[[pa.DataType], bool],
    usual: Sequence[str],
) -> str:
    """The column of images or labels: the one asked for, else that of Hugging Face's type, else one of a usual name."""
    if asked is not None:
        if asked not in table.schema.names:
            raise unknown_name("column", asked, table.schema.names)
        if not fits(table.schema.field(asked).type):
            raise UsageError(f"{where}: column {asked!r} holds {table.schema.field(asked).type}, which is no {what}")
        return asked
    wanted = {"image": "Image", "label": "ClassLabel"}[what]
    typed = [name for name, told in features_of(table.schema).items() if told.get("_type") == wanted]
    named = [name for name in table.schema.names if name.lower() in usual and fits(table.schema.field(name).type)]
    found = typed or named
    if len(found) != 1:
        told = f"several columns of {what}s ({', '.join(found)})" if found else f"no column of {what}s"
        columns = ", ".join(table.schema.names)
        raise UsageError(f"{where}: {told}; say which one in task.yaml as {what}: COLUMN (there are: {columns})")
    return found[0]


def _column(tables: Sequence[TableFile], name: str, where: str) -> pa.ChunkedArray:
    for table in tables:
        if name not in table.schema.names:
            raise UsageError(f"{table.path}: {unknown_name('column', name, table.schema.names)}")
    kind = tables[0].schema.field(name).type
    column = pa.chunked_array([chunk for table in tables for chunk in table.column(name).cast(kind).chunks], kind)
    if column.null_count:
        raise IntegrityError(f"{where}: {column.null_count} rows have no {name}")
    return column


def _called(table: TableFile, label: str) -> Sequence[str] | None:
    """What Hugging Face's `ClassLabel` calls its numbers, where the column is one."""
    names = features_of(table.schema).get(label, {}).get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise IntegrityError(f"{table.path}: what the labels of {label} are called is no list of words")
    return names


def _coded(column: pa.ChunkedArray, known: Sequence[str] | None, where: str) -> tuple[np.ndarray, Sequence[str]]:
    """Numbers with what they are called, or words by their order in the alphabet."""
    if pa.types.is_integer(column.type):
        codes = column.to_numpy().astype(np.int64)
        count = len(known) if known else min(int(codes.max(initial=0)) + 1, _MOST_CLASSES)
        if odd := np.flatnonzero((codes < 0) | (codes >= count)).tolist():
            raise IntegrityError(f"{where}: {codes[odd[0]]} in row {odd[0]} is not a class id below {count}")
        return codes, known or [str(code) for code in range(count)]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    names = sorted(pc.unique(column).to_pylist())
    return pc.index_in(column, pa.array(names, column.type)).to_numpy().astype(np.int64), names
