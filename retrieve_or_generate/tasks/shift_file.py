"""Shifted test sets, as a task.yaml attaches them: which images, and which of the task's classes each of them shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.tasks.base import Task
from retrieve_or_generate.tasks.image_folder import ImageFolders
from retrieve_or_generate.tasks.layout import Labelled, Layout
from retrieve_or_generate.tasks.source_file import OTHER_NAMES, SourceFile, ids_by_label, layout_of
from retrieve_or_generate.tasks.split import Reader
from retrieve_or_generate.tasks.words import names_in


class ShiftFile(SourceFile):
    """A test set of the same classes, or some of them, that was drawn otherwise."""

    test: str | None = Field(None, description="which split; null: test, or the only one, or the folder itself")


def read_shift(name: str, given: ShiftFile, path: Path, task: Task) -> Reader:
    """A shifted test set with the class ids of `task`: by name, by a folder's form of it, by WordNet id, or by number."""
    layout, where = layout_of(given, path), f"{path}: shift {name}"
    split = _split_of(name, given, layout, path)
    labels, places = layout.labels(split), {known: place for place, known in enumerate(task.class_names)}
    if isinstance(given.classes, dict):
        if odd := [label for label in given.classes if label not in labels]:
            raise UsageError(f"{where}: {unknown_name('label', odd[0], labels)}")
        return Labelled(
            layout, split, {label: _place(known, places, where) for label, known in given.classes.items()}, True
        )
    ids = dict(zip(task.wnids, range(len(task.wnids)), strict=True))
    if given.classes is None:
        ids |= ids_by_label(task.class_names, labels)
    else:  # then a number is a place in this list, and never one in the task's
        called = names_in(path.parent / given.classes) if isinstance(given.classes, str) else given.classes
        ids |= ids_by_label(task.class_names, task.class_names)
        ids |= {str(number): _place(known, places, where) for number, known in enumerate(called)}
    if unknown := [label for label in labels if label not in ids]:
        raise UsageError(
            f"{where}: {unknown_name('class', unknown[0], places)}. To say which label is which class, and leave out "
            "the others: classes: {LABEL: CLASS}"
        )
    return Labelled(layout, split, ids, True)


def _split_of(name: str, given: ShiftFile, layout: Layout, path: Path) -> str:
    """Which split of a shift is its test set; class folders may lie without one around them."""
    there, without = layout.splits(), isinstance(layout, ImageFolders)
    if given.test is None and without:
        return "test" if "test" in there else "."
    if given.test is None and len(there) == 1:
        return there[0]
    for one in (given.test,) if given.test is not None else ("test", *OTHER_NAMES["test"]):
        if one in there or (one == "." and without):
            return one
    listed = ", ".join(there) or "none"
    raise UsageError(
        f"{path}: shift {name}: no split {given.test or 'test'!r} in {layout.where} (there are: {listed}); say which: test: NAME"
    )


def _place(name: str, places: Mapping[str, int], where: str) -> int:
    if name not in places:
        raise UsageError(f"{where}: {unknown_name('class', name, places)}")
    return places[name]
