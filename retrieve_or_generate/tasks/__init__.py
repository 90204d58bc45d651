"""Tasks by name, folder or task.yaml. Adding a named one is an entry in `_POCKET` or in `published.PUBLISHED`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.pocket.places import TASK_SEAL, task_place
from retrieve_or_generate.store import read_seal
from retrieve_or_generate.tasks.base import SPLITS, Split, SplitName, Task
from retrieve_or_generate.tasks.published import PUBLISHED
from retrieve_or_generate.tasks.task_file import TASK_FILE, read_folder, read_task_file

__all__ = ["SPLITS", "Split", "SplitName", "Task", "load_task", "task_names"]


def _pocket(name: str) -> Path:
    folder = task_place(name)
    if not (folder / TASK_SEAL).is_file():
        from retrieve_or_generate.pocket.world import build_task  # loads torch, which a finished world does not need

        build_task(name)
    read_seal(folder, TASK_SEAL)
    return folder


_PLAIN = ("digits", "textures", "aircraft")
_POCKET: dict[str, Callable[[], Path]] = {
    name: partial(_pocket, name) for name in (*_PLAIN, *(f"{plain}-shifted" for plain in _PLAIN))
}


def task_names() -> list[str]:
    """Those that need no files of the user's; `published.PUBLISHED` has those that do."""
    return list(_POCKET)


def load_task(name: str) -> Task:
    """A named task, or the one in a folder or task.yaml; `UsageError` gives the nearest name, or says what is missing where."""
    known = [*_POCKET, *PUBLISHED]
    if not name:  # as a path it would be the working folder
        raise UsageError(f"a task without a name; give a task folder, or one of {', '.join(known)}")
    if name in _POCKET:
        return dataclasses.replace(_in_folder(_POCKET[name]()), name=name)
    if name in PUBLISHED:
        return PUBLISHED[name].task(name)
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return read_task_file(path, load_task)
    if "/" in name or path.suffix in (".yaml", ".yml"):
        raise UsageError(f"{name}: no such folder; give --task a task folder, or one of {', '.join(known)}")
    raise unknown_name("task", name, known)


def _in_folder(folder: Path) -> Task:
    file = folder / TASK_FILE
    return read_task_file(file, load_task) if file.is_file() else read_folder(folder)
