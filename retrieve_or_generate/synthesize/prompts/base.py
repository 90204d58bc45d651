"""The contract of a prompt strategy: what it gives, and what it may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.tasks import Task


@dataclass(frozen=True)
class Prompt:
    """What the generator is told, and `origin`: what it was made from, as the image set's manifest records it."""

    text: str
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSource:
    """What a strategy may look at: never an evaluation image. `like` is the retrieved set that is matched."""

    task: Task
    like: ImageSet
    settings: PromptSettings
    device: str = "cpu"
    progress: Progress | None = None
    """Told of prompts that take long to make."""


class Strategy(Protocol):
    """Prompts of one way of asking."""

    uses_real_captions: bool
    """Whether words of real images' captions are in its prompts: such a set is no longer made of class names alone."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits: of everything beside the task, the set and the settings that its prompts follow from."""

    def prompts(self, label: int, count: int) -> list[Prompt]:
        """`count` prompts for a class; asking for more gives the same ones first."""

    def record(self) -> dict[str, Any]:
        """What is worth telling of the prompts given so far (counts, choices made), as JSON for the image set's record."""


@runtime_checkable
class HoldsModel(Protocol):
    """A strategy that keeps a model in memory between classes."""

    def rest(self) -> None:
        """Let go of the model until more prompts are asked for: the generator may want its memory."""
