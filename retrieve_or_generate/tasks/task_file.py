"""`task.yaml`: one small file that makes a task of images as they lie.

    templates: ["a photo of a {}, a type of bird."]
    val: 0.2
    shifts: {drawn: ../birds-drawn}

Without `kind`, what lies in `data` (by default the folder of the file) says what reads it. `classnames.txt`,
`zeroshot_classification_templates.txt`, `synonyms.tsv`, `queries.tsv` and `wnids.txt` beside the file count as in any task folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.tasks.base import SPLITS, SplitName, Task
from retrieve_or_generate.tasks.image_folder import ImageFolders
from retrieve_or_generate.tasks.layout import HeldOut, Labelled, Layout
from retrieve_or_generate.tasks.queries import read_queries
from retrieve_or_generate.tasks.shift_file import ShiftFile, read_shift
from retrieve_or_generate.tasks.source_file import OTHER_NAMES, SourceFile, ids_by_label, layout_of
from retrieve_or_generate.tasks.split import Reader
from retrieve_or_generate.tasks.templates import clip_imagenet_templates
from retrieve_or_generate.tasks.webdataset import Webdataset
from retrieve_or_generate.tasks.words import (
    CLASS_NAMES,
    TEMPLATES,
    checked_names,
    checked_templates,
    class_names_in,
    lines_of,
    synonyms_in,
    templates_in,
    wnids_in,
)
from retrieve_or_generate.yaml_files import read_mapping, validated

TASK_FILE = "task.yaml"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
HeldOutShare = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]


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

    @field_validator("val", "test", mode="before")
    @classmethod
    def _no_truth(cls, given: Any) -> Any:
        if isinstance(given, bool):  # which is a number to Python
            raise ValueError("input should be a share such as 0.2, a number of images, or what the split is called")
        return given

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
    shifts = {**base.shifts, **{shift: read_shift(shift, told, path, base) for shift, told in given.shifts.items()}}
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
    return load(str(beside.resolve()) if beside.exists() else str(given.extends))  # a path would grow in a circle


def _described(given: TaskFile, path: Path, name: str) -> Task:
    """Everything but what may be added to a task that is extended, too."""
    layout = layout_of(given, path)
    called = _called(given, layout, path)
    names, ids = _classes(given, path, layout.labels(called["train"]))
    readers = _readers(given, layout, called, ids)
    return Task(name, names, (), path.parent, wnids=wnids_in(path.parent / "wnids.txt", names), readers=readers)


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
    for one in (asked,) if asked is not None else (name, *OTHER_NAMES[name]):
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
    elif labels and all(label.isdigit() for label in labels):
        raise UsageError(
            f"{path}: labels are numbers; say what they are called, in the order of the numbers: classes: [..]"
        )
    else:
        names = checked_names(labels, f"{path}: labels of train")
    return names, ids_by_label(names, labels)


def _templates(given: TaskFile, folder: Path) -> tuple[str, ...]:
    told = given.templates
    if told == "imagenet":
        return clip_imagenet_templates()
    if isinstance(told, str):
        if "{" in told and not (folder / told).exists():
            raise UsageError(f'{folder / TASK_FILE}: templates: a list, or a file; a single one is ["{told}"]')
        return checked_templates(lines_of(folder / told), str(folder / told))
    if told is not None:
        return checked_templates(told, f"{folder / TASK_FILE}: templates")
    return templates_in(folder / TEMPLATES) if (folder / TEMPLATES).is_file() else ()
