"""What is said around class names."""

from __future__ import annotations

from typing import Literal

from retrieve_or_generate.tasks.base import Task


def templates_for(task: Task, asked: tuple[str, ...] | Literal["imagenet"] | None) -> tuple[str, ...]:
    """The templates asked for, "{}" in them for the name: CLIP's 80 (`imagenet`), these, or (None) the task's own."""
    if asked == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # as functions of the name

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    return asked or task.templates
