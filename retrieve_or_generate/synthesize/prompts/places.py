"""`c, hypernym inside place`: a class, what it is a kind of, and somewhere it might be seen.

A strategy of 2405.20469, after Sariyildiz et al. (2212.08420): hypernyms of WordNet, places of Places365.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pocket.captions import HYPERNYMS, PLACES
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource
from retrieve_or_generate.synthesize.prompts.hypernyms import resolve
from retrieve_or_generate.synthesize.prompts.rounds import Rounds
from retrieve_or_generate.synthesize.prompts.text import clean, numbered_lines
from retrieve_or_generate.tasks import Task

_PLACES365 = re.compile(r"/[a-z]/(\S+)(?: \d+)?")  # /a/apartment_building/outdoor 8


class Places:
    """Every place once, in an order of each class's own, then round again."""

    uses_real_captions = False

    def __init__(self, source: PromptSource):
        task, settings = source.task, source.settings
        self._task_name, self._names = task.name, task.class_names
        self._places = _pocket_places(task) if settings.places is None else read_places(Path(settings.places))
        self._hypernyms = resolve(task, settings.hypernyms, source.like.excluded)
        words = [found and found.hypernym for found in self._hypernyms]
        self.fingerprint = content_key(["places", words, self._places])
        self._rounds = Rounds(self._of)

    def _of(self, label: int) -> list[Prompt]:
        name, found = self._names[label], self._hypernyms[label]
        assert found is not None  # only a class that the retrieved set leaves out has none, and it is not asked for
        order = generator_for("synthesize", "places", self._task_name, name).permutation(len(self._places))
        return [
            Prompt(f"{name}, {found.hypernym} inside {place}", {"hypernym": found.hypernym, "place": place})
            for place in (self._places[i] for i in order)
        ]

    def prompts(self, label: int, count: int) -> list[Prompt]:
        return self._rounds.take(label, count)

    def record(self) -> dict[str, Any]:
        """Which hypernym each class has and what it was chosen from."""
        known = zip(self._names, self._hypernyms, strict=True)
        hypernyms = {name: {"hypernym": found.hypernym, **found.choices} for name, found in known if found}
        ambiguous = sum("other_senses" in told or "other_hypernyms" in told for told in hypernyms.values())
        return {
            "places": len(self._places),
            "hypernyms": hypernyms,
            "ambiguous": ambiguous,
            **self._rounds.record(),
        }


def read_places(path: Path) -> tuple[str, ...]:
    """Places in file order, each once: plain lines, or Places365's `/a/airplane_cabin 1` (its `_` and `/` are spaces)."""
    places = dict.fromkeys(_place(line) for _, line in numbered_lines(path, "places, one a line"))
    places.pop("", None)
    if not places:
        raise UsageError(f"{path}: no place in it; put one a line, or take Places365's categories_places365.txt")
    return tuple(places)


def _place(line: str) -> str:
    published = _PLACES365.fullmatch(line.strip())
    return clean(re.sub("[_/]", " ", published[1]) if published else line)


def _pocket_places(task: Task) -> tuple[str, ...]:
    if not set(task.class_names) <= set(HYPERNYMS):
        raise UsageError(
            "prompts with places: give synthesize.prompts.places a file with one a line, "
            "such as Places365's categories_places365.txt"
        )
    return PLACES
