"""Prompts that are given in their order, and from the first again when all were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any

from retrieve_or_generate.synthesize.prompts.base import Prompt


class Rounds:
    """The prompts of each class in turn. `of` gives a class's own, one at least; it is asked once per class.

    A prompt that is given again makes another image, since an image's seed follows from its number within the class.
    """

    def __init__(self, of: Callable[[int], Sequence[Prompt]]):
        self._of = cache(of)
        self._asked: dict[int, int] = {}

    def take(self, label: int, count: int) -> list[Prompt]:
        """The first `count` of a class; none where none are asked for, also of a class that has none."""
        if not count:
            return []
        self._asked[label] = max(count, self._asked.get(label, 0))
        return list(islice(cycle(self._of(label)), count))

    def record(self) -> dict[str, Any]:
        """Prompts given so far, those among them that had been given before, and the classes that came round again."""
        held = {label: len(self._of(label)) for label in self._asked}
        over = {label: asked - held[label] for label, asked in self._asked.items() if asked > held[label]}
        return {
            "given": sum(self._asked.values()),
            "given_again": sum(over.values()),
            "classes_given_again": len(over),
        }
