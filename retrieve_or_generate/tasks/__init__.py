"""Tasks by name or folder. Adding a named one is an entry in `_NAMED`: a function that gives its folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.pocket.places import TASK_SEAL, task_place
from retrieve_or_generate.store import read_seal
from retrieve_or_generate.tasks.base import SPLITS, Split, SplitName, Task, read_task

__all__ = ["SPLITS", "Split", "SplitName", "Task", "load_task", "task_names"]


def _pocket(name: str) -> Path:
    folder = task_place(name)
    if not (folder / TASK_SEAL).is_file():
        from retrieve_or_generate.pocket.world import build_task  # loads torch, which a finished world does not need

        build_task(name)
    read_seal(folder, TASK_SEAL)
    return folder


_NAMED: dict[str, Callable[[], Path]] = {name: partial(_pocket, name) for name in ("digits", "textures", "aircraft")}


def task_names() -> list[str]:
    return list(_NAMED)


def load_task(name: str) -> Task:
    """A named task, or the one in a folder; `UsageError` gives the nearest name."""
    if not name:  # as a path it would be the working folder
        raise UsageError(
            f"a task without a name; give a folder in CLIP_benchmark's layout, or one of {', '.join(_NAMED)}"
        )
    if name in _NAMED:
        return read_task(_NAMED[name](), name)
    if Path(name).is_dir():
        return read_task(Path(name))
    if "/" in name:
        raise UsageError(
            f"{name}: no such folder; give --task a folder in CLIP_benchmark's layout, or one of {', '.join(_NAMED)}"
        )
    raise unknown_name("task", name, task_names())
