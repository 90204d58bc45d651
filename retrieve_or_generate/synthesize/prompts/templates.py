"""The class name in templates, one after the other."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource
from retrieve_or_generate.tasks.templates import filled, templates_for


class Templates:
    """The task's own templates, others, or the 80 of CLIP, in turn."""

    uses_real_captions = False

    def __init__(self, source: PromptSource):
        self._names, self._templates = source.task.class_names, templates_for(source.task, source.settings.templates)
        self.fingerprint = content_key(["templates", self._templates])

    def prompts(self, label: int, count: int) -> list[Prompt]:
        own = [Prompt(filled(template, self._names[label]), {"template": template}) for template in self._templates]
        return list(islice(cycle(own), count))

    def record(self) -> dict[str, Any]:
        return {"templates": len(self._templates)}
