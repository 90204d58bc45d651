"""What is said around class names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from retrieve_or_generate.tasks.base import Task


def filled(template: str, name: str) -> str:
    """`template` with `name` at `{}`, and before it "a" or "an" at `{a}`: what the name's first letter asks for."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return template.replace("{a}", article).replace("{}", name)


def as_functions(templates: Sequence[str]) -> list[Callable[[str], str]]:
    """A function of the class name for each template, as open_clip's zero-shot classifier takes them."""
    return [partial(filled, template) for template in templates]


def clip_imagenet_templates() -> tuple[str, ...]:
    """The 80 that CLIP was published with for ImageNet."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # as functions of the name

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def templates_for(task: Task, asked: tuple[str, ...] | Literal["imagenet"] | None) -> tuple[str, ...]:
    """The templates asked for, "{}" in them for the name: CLIP's 80 (`imagenet`), these, or (None) the task's own."""
    if asked == "imagenet":
        return clip_imagenet_templates()
    return asked or task.templates
