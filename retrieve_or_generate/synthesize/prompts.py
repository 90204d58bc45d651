"""Prompt strategies. Each gives the prompts of one class; adding one is a function and an entry in `STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

from retrieve_or_generate.errors import unknown_name
from retrieve_or_generate.tasks import Task

Strategy = Callable[[Task, int, int], list[str]]


def class_name(task: Task, label: int, count: int) -> list[str]:
    """The bare class name, `count` times."""
    return [task.class_names[label]] * count


def templates(task: Task, label: int, count: int) -> list[str]:
    """The task's templates in turn, filled with the class name."""
    filled = [template.replace("{}", task.class_names[label]) for template in task.templates]
    return list(islice(cycle(filled), count))


STRATEGIES: dict[str, Strategy] = {"class_name": class_name, "templates": templates}


def prompts_for(strategy: str, task: Task, label: int, count: int) -> list[str]:
    """`count` prompts for a class; asking for more gives the same ones first."""
    if strategy not in STRATEGIES:
        raise unknown_name("prompt strategy", strategy, STRATEGIES)
    return STRATEGIES[strategy](task, label, count)
