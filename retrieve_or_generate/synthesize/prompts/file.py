"""The user's own prompts, from a file: class name, tab, prompt on each line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource
from retrieve_or_generate.synthesize.prompts.rounds import Rounds
from retrieve_or_generate.synthesize.prompts.text import named, read_by_class


class File:
    """Prompts as they stand in the file, in its order, round again where a class needs more than it has.

    Whether they are made of real captions only the user knows, who says so in the settings.
    """

    def __init__(self, source: PromptSource):
        if source.settings.file is None:
            raise UsageError(
                "prompts from a file: say which as synthesize.prompts.file, with a class name, a tab and a prompt on each line"
            )
        path, names = Path(source.settings.file), source.task.class_names
        texts = read_by_class(path, names, "prompt")
        missing = [name for name in names if not texts[name] and name not in source.like.excluded]
        if missing:
            raise UsageError(f"{path}: no prompt for class {named(missing)}; put a line for each class")
        self.uses_real_captions = source.settings.real_captions
        self.fingerprint = content_key(
            ["file", [list(texts[name].values()) for name in names], self.uses_real_captions]
        )
        self._names, self._texts = names, texts
        self._rounds = Rounds(self._of)

    def _of(self, label: int) -> list[Prompt]:
        return [Prompt(text, {"line": number}) for number, text in self._texts[self._names[label]].items()]

    def prompts(self, label: int, count: int) -> list[Prompt]:
        return self._rounds.take(label, count)

    def record(self) -> dict[str, Any]:
        return {"prompts": sum(map(len, self._texts.values())), **self._rounds.record()}
