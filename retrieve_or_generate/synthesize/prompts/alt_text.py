"""Captions of the retrieved images as they came with them: alt text of the web.

The prompt ablation of "The Unmet Promise" (2406.05184, appendix B.3) has it as its third strategy.
"""

from __future__ import annotations

from typing import Any

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource
from retrieve_or_generate.synthesize.prompts.rounds import Rounds
from retrieve_or_generate.synthesize.prompts.text import clean


class AltText:
    """One prompt for each image that the retrieved set keeps of the class, in rank order, then round again.

    Images without a caption give none. `origin` names the image, by its key in that set.
    """

    uses_real_captions = True
    fingerprint = content_key("alt_text")

    def __init__(self, source: PromptSource):
        kept = source.like.kept
        captions = [clean(caption or "") for caption in kept["caption"]]
        self._names, self._folder, self._kept = source.task.class_names, source.like.folder, source.like.counts()
        self._own: list[list[Prompt]] = [[] for _ in self._names]
        for label, key, caption in zip(kept["label"], kept["key"], captions, strict=True):
            if caption:
                self._own[label].append(Prompt(caption, {"caption_of": key}))
        self._rounds = Rounds(self._of)

    def _of(self, label: int) -> list[Prompt]:
        if not self._own[label]:
            raise UsageError(
                f"{self._folder}: none of its {self._kept[label]} images of {self._names[label]!r} has a caption; "
                "choose another synthesize.prompts"
            )
        return self._own[label]

    def prompts(self, label: int, count: int) -> list[Prompt]:
        return self._rounds.take(label, count)

    def record(self) -> dict[str, Any]:
        captions = sum(map(len, self._own))
        return {
            "captions": captions,
            "without_caption": int(self._kept.sum()) - captions,
            **self._rounds.record(),
        }
