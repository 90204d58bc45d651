"""`task.yaml`: one small file that makes a task of images as they lie.

    templates: ["a photo of a {}, a type of bird."]
    val: 0.2
    shifts: {drawn: ../birds-drawn}

Without `kind`, what lies in `data` (by default the folder of the file) says what reads it. `classnames.txt`,
`zeroshot_classification_templates.txt`, `synonyms.tsv`, `queries.tsv` and `wnids.txt` beside the file count as in any task folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.settings import Settings
from retrieve_or_generate.tasks.base import SPLITS, SplitName, Task
from retrieve_or_generate.tasks.image_folder import ImageFolders
from retrieve_or_generate.tasks.image_tar import ImageTars
from retrieve_or_generate.tasks.layout import HeldOut, Labelled, Layout
from retrieve_or_generate.tasks.queries import read_queries
from retrieve_or_generate.tasks.split import Reader
from retrieve_or_generate.tasks.tables import Columns, Tables
from retrieve_or_generate.tasks.templates import clip_imagenet_templates
from retrieve_or_generate.tasks.webdataset import Webdataset
from retrieve_or_generate.tasks.words import (
    CLASS_NAMES,
    TEMPLATES,
    checked_names,
    checked_templates,
    class_names_in,
    lines_of,
    names_in,
    synonyms_in,
    templates_in,
    wnids_in,
)
from retrieve_or_generate.yaml_files import read_mapping, validated

TASK_FILE = "task.yaml"
Kind = Literal["image_folder", "image_tar", "webdataset", "hugging_face", "parquet"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
HeldOutShare = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]
_OTHER_NAMES = {"train": ("training",), "val": ("validation", "valid", "dev"), "test": ("testing",)}


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


class ShiftFile(SourceFile):
    """A test set of the same classes, or some of them, that was drawn otherwise."""

    test: str | None = Field(None, description="which split; null: test, or the only one, or the folder itself")


class TaskFile(SourceFile):
    """A task.yaml."""

    name: Name | None = Field(None, description="null: the folder's")
    extends: str | None = Field(None, description="a task whose splits and class names this one has")
    train: str | None = Field(None, description="what the split is called there; null: its own name")
    val: HeldOutShare | str | None = Field(None, description="as train; or how much of train is held out")
    test: HeldOutShare | str | None = Field(None, description="as val")
    templates: tuple[str, ...] | str | None = Field(
        None, description="around class names; imagenet: CLIP's 80; or a file"
    )
    shifts: dict[Name, ShiftFile] = Field({}, description="shifted test sets by name: a place, or keys as here")

    @field_validator("shifts", mode="before")
    @classmethod
    def _places(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if clash := sorted(set(SPLITS) & given.keys()):
            raise ValueError(f"{clash[0]!r} is a split; call the shift something else")
        return {name: {"data": value} if isinstance(value, str) else value for name, value in given.items()}


def read_task_file(path: Path, load: Callable[[str], Task]) -> Task:
    """The task that `path` describes; `load` gives the one that it extends."""
    given = validated(TaskFile, read_mapping(path, "a task file"), str(path))
    folder, name = path.parent, given.name or path.absolute().parent.name
    try:
        base = _extended(given, path, load) if given.extends else _described(given, path, name)
    except RecursionError:
        raise UsageError(
            f"{path}: extends goes round in a circle; let one of these tasks say where its images are"
        ) from None
    synonyms = synonyms_in(folder / "synonyms.tsv") or base.synonyms
    queries = folder / "queries.tsv"
    rewrites = read_queries(queries, base.class_names, synonyms) if queries.is_file() else base.rewrites
    shifts = {**base.shifts, **{shift: _shift(shift, told, path, base) for shift, told in given.shifts.items()}}
    templates = _templates(given, folder) or base.templates
    if not templates:
        raise UsageError(f'{path}: no templates; say what stands around class names: templates: ["a photo of a {{}}."]')
    return Task(
        name, base.class_names, templates, folder, synonyms, rewrites, base.wnids, base.readers, shifts, base.notes
    )


def read_folder(folder: Path) -> Task:
    """The task in a folder of CLIP_benchmark's layout that has no task.yaml."""
    if not (folder / CLASS_NAMES).is_file():
        raise UsageError(f"{folder}: no {CLASS_NAMES} and no {TASK_FILE}, so no task; docs/tasks.md says what one is")
    layout = Webdataset(folder)
    there = layout.splits()
    if missing := [name for name in SPLITS if name not in there]:
        raise UsageError(
            f"{folder}: no split {missing[0]!r} (there are: {', '.join(there) or 'none'}); put a {TASK_FILE} there that says what "
            f"it is, such as, of {missing[0]}: 0.2, the share of train that is held out (docs/tasks.md)"
        )
    templates = templates_in(folder / TEMPLATES)
    synonyms, wnids = synonyms_in(folder / "synonyms.tsv"), wnids_in(folder / "wnids.txt", layout.names)
    queries = folder / "queries.tsv"
    rewrites = read_queries(queries, layout.names, synonyms) if queries.is_file() else {}
    ids = {name: label for label, name in enumerate(layout.names)}
    readers: dict[SplitName, Reader] = {name: Labelled(layout, name, ids) for name in SPLITS}
    return Task(folder.absolute().name, layout.names, templates, folder, synonyms, rewrites, wnids, readers)


def _extended(given: TaskFile, path: Path, load: Callable[[str], Task]) -> Task:
    own = sorted(given.model_fields_set - {"name", "extends", "templates", "shifts"})
    if own:
        raise UsageError(f"{path}: {own[0]} is of the task that it extends ({given.extends}); leave it out, or extends")
    beside = path.parent / str(given.extends)
    return load(str(beside) if beside.exists() else str(given.extends))


def _described(given: TaskFile, path: Path, name: str) -> Task:
    """Everything but what may be added to a task that is extended, too."""
    layout = _layout(given, path)
    called = _called(given, layout, path)
    names, ids = _classes(given, path, layout.labels(called["train"]))
    readers = _readers(given, layout, called, ids)
    return Task(name, names, (), path.parent, wnids=wnids_in(path.parent / "wnids.txt", names), readers=readers)


def _layout(given: SourceFile, path: Path) -> Layout:
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


def _called(given: TaskFile, layout: Layout, path: Path) -> dict[SplitName, str]:
    """What each split that is not held out is called; `UsageError` for one that is not there."""
    called: dict[SplitName, str] = {}
    for name in SPLITS:
        asked = getattr(given, name)
        if asked is None or isinstance(asked, str):
            called[name] = _split_called(name, asked, layout, path)
    return called


def _split_called(name: SplitName, asked: str | None, layout: Layout, path: Path) -> str:
    there = layout.splits()
    for one in (asked,) if asked is not None else (name, *_OTHER_NAMES[name]):
        if one in there or (one == "." and isinstance(layout, ImageFolders)):
            return one
    hint = (
        f"; hold some of train out with {name}: 0.2, or say what it is called: {name}: NAME" if name != "train" else ""
    )
    raise UsageError(
        f"{path}: no split {asked or name!r} in {layout.where} (there are: {', '.join(there) or 'none'}){hint}"
    )


def _readers(
    given: TaskFile, layout: Layout, called: Mapping[SplitName, str], ids: Mapping[str, int]
) -> dict[SplitName, Reader]:
    readers: dict[SplitName, Reader] = {name: Labelled(layout, split, ids) for name, split in called.items()}
    parts: list[SplitName] = [name for name in SPLITS if name not in called]
    if parts:
        shares = tuple(getattr(given, name) for name in parts)
        whole = readers["train"]
        readers |= {"train": HeldOut(whole, shares, 0)}
        readers |= {name: HeldOut(whole, shares, part) for part, name in enumerate(parts, 1)}
    return {name: readers[name] for name in SPLITS}


def _classes(given: SourceFile, path: Path, labels: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names, and their ids by the labels that stand in the data, which are `labels`."""
    told, where = given.classes, f"{path}: classes"
    if isinstance(told, dict):
        names = checked_names(tuple(dict.fromkeys(told.values())), where)
        return names, {label: names.index(name) for label, name in told.items()}
    beside = path.parent / (told if isinstance(told, str) else CLASS_NAMES)
    if isinstance(told, str) or (told is None and beside.is_file()):
        names = class_names_in(beside)
    elif told is not None:
        names = checked_names(told, where)
    elif all(label.isdigit() for label in labels):
        raise UsageError(
            f"{path}: labels are numbers; say what they are called, in the order of the numbers: classes: [..]"
        )
    else:
        names = checked_names(labels, f"{path}: labels of train")
    return names, _ids(names, labels)


def _ids(names: tuple[str, ...], labels: Iterable[str]) -> dict[str, int]:
    """By name as it is, and as a folder may be called after it; by number where the labels are numbers and no names."""
    ids = {name: place for place, name in enumerate(names)}
    as_folders = {name.replace("/", "_"): place for name, place in ids.items() if "/" in name}
    numbers = {str(place): place for place in range(len(names))}
    by_number = not set(labels) & ids.keys()
    return {**(numbers if by_number else {}), **as_folders, **ids}


def _templates(given: TaskFile, folder: Path) -> tuple[str, ...]:
    told = given.templates
    if told == "imagenet":
        return clip_imagenet_templates()
    if isinstance(told, str):
        return checked_templates(lines_of(folder / told), str(folder / told))
    if told is not None:
        return checked_templates(told, f"{folder / TASK_FILE}: templates")
    return templates_in(folder / TEMPLATES) if (folder / TEMPLATES).is_file() else ()


def _shift(name: str, given: ShiftFile, path: Path, task: Task) -> Reader:
    """A shifted test set with the class ids of `task`: by name, by a folder's form of it, by WordNet id, or by number."""
    layout = _layout(given, path)
    split = _shift_split(name, given, layout, path)
    labels, places = layout.labels(split), {known: place for place, known in enumerate(task.class_names)}
    if isinstance(given.classes, dict):
        if odd := [label for label in given.classes if label not in labels]:
            raise UsageError(f"{path}: shift {name}: {unknown_name('label', odd[0], labels)}")
        return Labelled(layout, split, {label: _place(known, places) for label, known in given.classes.items()}, True)
    ids = dict(zip(task.wnids, range(len(task.wnids)), strict=True))
    if given.classes is None:
        ids |= _ids(task.class_names, labels)
    else:  # then a number is a place in this list, and never one in the task's
        called = names_in(path.parent / given.classes) if isinstance(given.classes, str) else given.classes
        ids |= _ids(task.class_names, task.class_names)
        ids |= {str(number): _place(known, places) for number, known in enumerate(called)}
    if unknown := [label for label in labels if label not in ids]:
        raise UsageError(
            f"{path}: shift {name}: {unknown_name('class', unknown[0], places)}. To say which label is which class, and leave out "
            "the others: classes: {LABEL: CLASS}"
        )
    return Labelled(layout, split, ids, True)


def _shift_split(name: str, given: ShiftFile, layout: Layout, path: Path) -> str:
    """Which split of a shift is its test set; class folders may lie without one around them."""
    there, without = layout.splits(), isinstance(layout, ImageFolders)
    if given.test is None and without:
        return "test" if "test" in there else "."
    if given.test is None and len(there) == 1:
        return there[0]
    for one in (given.test,) if given.test is not None else ("test", *_OTHER_NAMES["test"]):
        if one in there or (one == "." and without):
            return one
    listed = ", ".join(there) or "none"
    raise UsageError(
        f"{path}: shift {name}: no split {given.test or 'test'!r} in {layout.where} (there are: {listed}); say which: test: NAME"
    )


def _place(name: str, places: Mapping[str, int]) -> int:
    if name not in places:
        raise unknown_name("class", name, places)
    return places[name]
