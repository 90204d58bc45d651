"""The tasks that have a name, and whether the files of each are there."""

from __future__ import annotations

import os
from typing import Any

from retrieve_or_generate.tasks import SPLITS, load_task, task_names
from retrieve_or_generate.tasks.published import DATA, PUBLISHED


def list_tasks() -> list[dict[str, Any]]:
    """A row for each: `task, classes, train, val, test, shifts, files`. Of published ones the published numbers."""
    rows: list[dict[str, Any]] = []
    for name in task_names():
        task = load_task(name)
        sizes: dict[str, int] = {split: len(task.split(split)) for split in SPLITS}
        shifts = {"shifts": list(task.shifts)}
        rows.append({"task": name, "classes": len(task.class_names), **sizes, **shifts, "files": "pocket world"})
    for name, published in PUBLISHED.items():
        sizes = dict(zip(map(str, SPLITS), published.sizes, strict=True))
        files = {"shifts": [], "files": _files(published.place(), name)}
        rows.append({"task": name, "classes": published.classes, **sizes, **files})
    return rows


def _files(place: object, name: str) -> str:
    if place:
        return str(place)
    where = f"not in {os.environ[DATA]}" if os.environ.get(DATA) else f"no --data or {DATA}"
    return f"{where}; rog tasks {name} says what to fetch"
