"""Where labelled images lie, as a task.yaml says it, and which layout reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.settings import Settings
from retrieve_or_generate.tasks.base import SplitName
from retrieve_or_generate.tasks.image_folder import ImageFolders
from retrieve_or_generate.tasks.image_tar import ImageTars
from retrieve_or_generate.tasks.layout import Layout
from retrieve_or_generate.tasks.tables import Columns, Tables
from retrieve_or_generate.tasks.webdataset import Webdataset

Kind = Literal["image_folder", "image_tar", "webdataset", "hugging_face", "parquet"]
OTHER_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("training",),
    "val": ("validation", "valid", "dev"),
    "test": ("testing",),
}
"""What a split may be called besides."""


class SourceFile(Settings):
    """Where labelled images lie, and what their labels are called."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    data: str = Field(".", description="folder, tar or parquet file, from the folder of this file")
    kind: Kind | None = Field(None, description="how it is laid out; null: what lies there says so")
    image: str | None = Field(None, description="column of the images (tables)")
    label: str | None = Field(None, description="column of the labels (tables)")
    split: str | None = Field(None, description="column that says of which split a row is (tables)")
    classes: tuple[str, ...] | dict[str, str] | str | None = Field(
        None, description="class names in the order of their ids; label: class name; or a file of class names"
    )


def layout_of(given: SourceFile, path: Path) -> Layout:
    """What reads the images of `given`, which stands in the file `path`; `UsageError` where nothing does."""
    place = path.parent / given.data
    if not place.exists():
        raise UsageError(f"{path}: data: {place}: no such file or folder")
    kind, columns = given.kind or _kind(place, path), Columns(given.image, given.label, given.split)
    if columns != Columns() and kind not in ("hugging_face", "parquet"):
        raise UsageError(f"{path}: image, label and split name columns of tables, but the kind is {kind}")
    if kind == "image_folder":
        return ImageFolders(place)
    if kind == "image_tar":
        return ImageTars(place)
    return Webdataset(place) if kind == "webdataset" else Tables(place, columns)


def _kind(place: Path, path: Path) -> Kind:
    if place.is_file():
        return "image_tar" if place.suffix == ".tar" else "parquet"
    if any(place.glob("*/*.tar")):
        return "webdataset"
    if any(place.glob("*/state.json")) or (place / "state.json").is_file():
        return "hugging_face"
    if any(place.glob("*.parquet")) or any(place.glob("data/*.parquet")):
        return "parquet"
    if any(entry.is_dir() for entry in place.iterdir()):
        return "image_folder"
    if any(place.glob("*.tar")):
        return "image_tar"
    raise UsageError(f"{path}: data: {place}: no class folders, tars or tables in it")


def ids_by_label(names: tuple[str, ...], labels: Iterable[str]) -> dict[str, int]:
    """By name as it is, and as a folder may be called after it; by number where the labels are numbers and no names."""
    ids = {name: place for place, name in enumerate(names)}
    as_folders = {name.replace("/", "_"): place for name, place in ids.items() if "/" in name}
    numbers = {str(place): place for place in range(len(names))}
    by_number = not set(labels) & ids.keys()
    return {**(numbers if by_number else {}), **as_folders, **ids}
