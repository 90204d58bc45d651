"""The bare class name."""

from __future__ import annotations

from typing import Any

from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource


class ClassName:
    """Every prompt is the class name."""

    uses_real_captions = False
    fingerprint = content_key("class_name")

    def __init__(self, source: PromptSource):
        self._names = source.task.class_names

    def prompts(self, label: int, count: int) -> list[Prompt]:
        return [Prompt(self._names[label])] * count

    def record(self) -> dict[str, Any]:
        return {}
