"""Sentences of a language model about a class, after SynCLR (2312.17742) and appendix C.1 of 2406.05184.

The model is shown three captions of other things and goes on with the class (`in_context`). Draw number i of a class depends on the
class's name, i, the settings and the model alone: not on how many are asked for, what was drawn before, or where it was resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.in_context import Lists, Query, read_lists
from retrieve_or_generate.kept_texts import KeptTexts
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource
from retrieve_or_generate.synthesize.prompts.naming import names_class
from retrieve_or_generate.synthesize.prompts.nucleus import MOST_TOKENS, LineModel
from retrieve_or_generate.synthesize.prompts.text import clean
from retrieve_or_generate.text_models import find_text_model

BLOCK = 32
"""Draws of a class that are made together, always: sums of another shape have other last bits, and those can turn a word."""

_DRY_BLOCKS, _DRY_SENTENCES = 4, 6
"""A class is asked no further once its last blocks together gave fewer new sentences than this, one in twenty draws."""

_VERSION = 1  # part of every key: raise when the same draw gives another sentence


@dataclass
class _Heard:
    """What was drawn of one class so far: the prompts it gave, and how many each block gave."""

    prompts: list[Prompt] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    new_in_block: list[int] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def is_dry(self) -> bool:
        return len(self.new_in_block) >= _DRY_BLOCKS and sum(self.new_in_block[-_DRY_BLOCKS:]) < _DRY_SENTENCES


class Llm:
    """Sentences that name the class, no two alike, in the order of their draws.

    A model that has nothing new to say of a class is asked no further: its sentences come round again.
    """

    uses_real_captions = False

    def __init__(self, source: PromptSource):
        settings = source.settings
        self._settings, self._device, self._names = settings, source.device, source.task.class_names
        self._progress = source.progress
        self._files = find_text_model(settings.model, "language")
        self._lists = read_lists(Path(settings.examples) if settings.examples is not None else None)
        self._is_texture = (settings.form or _form(source.task.templates)) == "texture"
        if not self._is_texture:
            _check_backgrounds(self._lists, [name for name in self._names if name not in source.like.excluded])
        self.fingerprint = content_key(["llm", self._files.fingerprint, self._lists.fingerprint, _VERSION])
        rests_on = [self.fingerprint, settings.called, self._is_texture, settings.temperature, settings.top_p]
        self._texts = KeptTexts("sentences", content_key([*rests_on, settings.dtype, MOST_TOKENS, BLOCK]))
        self._model: LineModel | None = None
        self._heard: dict[int, _Heard] = {}
        self._asked: dict[int, int] = {}

    def prompts(self, label: int, count: int) -> list[Prompt]:
        if not count:
            return []
        heard = self._heard.setdefault(label, _Heard())
        while len(heard.prompts) < count and not heard.is_dry:
            self._listen(label, heard)
        if not heard.prompts:
            drawn, name = heard.tally["drawn"], self._names[label]
            raise UsageError(
                f"{self._files.name}: none of {drawn} sentences names {name!r}; take another synthesize.prompts.model, or "
                "synthesize.prompts.lacking_class=keep"
            )
        self._asked[label] = max(count, self._asked.get(label, 0))
        return list(islice(cycle(heard.prompts), count))

    def _listen(self, label: int, heard: _Heard) -> None:
        """Draw the class's next block, and take what is new of it. What lacks the class is counted even where it is kept."""
        number, before = len(heard.new_in_block), len(heard.prompts)
        draws = range(number * BLOCK, (number + 1) * BLOCK)
        for draw, said in zip(draws, self._sentences(label, draws), strict=True):
            query, text = self._query(label, draw), clean(said)
            lacks_class = bool(text) and not names_class(text, self._names[label])
            rejected = lacks_class and self._settings.lacking_class == "drop"
            duplicate = not rejected and text in heard.seen
            told = {"empty": not text, "lacking_class": lacks_class, "rejected": rejected, "duplicate": duplicate}
            heard.tally.update(["drawn", query.kind, *(name for name, is_so in told.items() if is_so)])
            if text and not rejected and not duplicate:
                heard.seen.add(text)
                beside = {"beside": query.beside} if query.beside else {}
                heard.prompts.append(Prompt(text, {"draw": draw, "kind": query.kind, **beside}))
        heard.new_in_block.append(len(heard.prompts) - before)

    def _query(self, label: int, draw: int) -> Query:
        name = self._names[label]
        called = self._settings.called.replace("{}", name)
        return self._lists.query(name, called, self._is_texture, generator_for("prompts", "llm query", name, draw))

    def _sentences(self, label: int, draws: Sequence[int]) -> list[str]:
        """One block, as it was kept or else drawn now."""
        name = self._names[label]
        kept = f"{draws[0]} {name}"
        if kept not in self._texts.known:
            with self._texts.making() as known:
                if kept not in known:
                    queries = [self._query(label, draw).text for draw in draws]
                    rngs = [generator_for("prompts", "llm words", name, draw) for draw in draws]
                    said = self._loaded().complete(queries, rngs, self._settings.temperature, self._settings.top_p)
                    self._texts.add({kept: said})
                    if self._progress:
                        self._progress("classes that sentences are drawn for", len(self._heard), len(self._names))
        return list(self._texts.known[kept])

    def _loaded(self) -> LineModel:
        if self._model is None:
            self._model = LineModel(self._files, self._settings.dtype, self._device)
        return self._model

    def rest(self) -> None:
        self._model = None

    def record(self) -> dict[str, Any]:
        tally: Counter[str] = Counter()
        for heard in self._heard.values():
            tally += heard.tally
        held = {label: len(self._heard[label].prompts) for label in self._asked}
        over = [asked - held[label] for label, asked in self._asked.items() if asked > held[label]]
        return {
            "model": self._files.name,
            "form": "texture" if self._is_texture else "object",
            **{name: tally[name] for name in ("drawn", "lacking_class", "rejected", "duplicate", "empty")},
            "kinds": {kind: tally[kind] for kind in self._lists.examples if tally[kind]},
            "given": sum(self._asked.values()),
            "given_again": sum(over),
            "classes_given_again": len(over),
        }


def _form(templates: tuple[str, ...]) -> str:
    """Texture where a template of the task says that its classes are textures, as DTD's does."""
    return "texture" if any("texture" in template.lower() for template in templates) else "object"


def _check_backgrounds(lists: Lists, class_names: Sequence[str]) -> None:
    bare = [name for name in class_names if name not in lists.backgrounds] if "" not in lists.backgrounds else []
    if bare:
        raise UsageError(
            f"synthesize.prompts.examples: backgrounds.txt has none for class {bare[0]!r}; put one for it, or some without a class"
        )
