"""Prompt strategies by name. Adding one is a file with its class, and an entry in `STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable

from retrieve_or_generate.synthesize.prompts.alt_text import AltText
from retrieve_or_generate.synthesize.prompts.base import HoldsModel, Prompt, PromptSource, Strategy
from retrieve_or_generate.synthesize.prompts.class_name import ClassName
from retrieve_or_generate.synthesize.prompts.file import File
from retrieve_or_generate.synthesize.prompts.image_captions import ImageCaptions
from retrieve_or_generate.synthesize.prompts.llm import Llm
from retrieve_or_generate.synthesize.prompts.places import Places
from retrieve_or_generate.synthesize.prompts.templates import Templates

__all__ = ["STRATEGIES", "HoldsModel", "Prompt", "PromptSource", "Strategy", "load_strategy"]

STRATEGIES: dict[str, Callable[[PromptSource], Strategy]] = {
    "class_name": ClassName,
    "templates": Templates,
    "places": Places,
    "alt_text": AltText,
    "image_captions": ImageCaptions,
    "llm": Llm,
    "file": File,
}


def load_strategy(source: PromptSource) -> Strategy:
    """The strategy that the settings name; a `UsageError` says what it lacks."""
    return STRATEGIES[source.settings.strategy](source)
