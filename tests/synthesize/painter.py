"""What stands in for a generator where only the numbers, the order and the fate of images matter: patches of colour, by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.sampler import Drawn

SIDE = 32


def patches(seed: int) -> np.ndarray:
    """(32, 32, 3) uint8: 4 × 4 patches of random colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return colours.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)


class _NoTowers:
    """A pipeline that reads prompts of any length."""

    text: ClassVar[Any]
    components: ClassVar[dict[str, Any]] = {}

    def __call__(self) -> None: ...


_NoTowers.text = _NoTowers()


@dataclass
class Painter:
    """Paints an image from its seed alone. `instead` gives seeds another image, `unsafe` those that are flagged."""

    instead: dict[int, np.ndarray] = field(default_factory=dict)
    unsafe: Callable[[str, int], bool] = lambda prompt, seed: False
    calls: list[int] = field(default_factory=list)
    before: Callable[[int], None] = lambda call: None
    name: str = "painter@1"
    fingerprint: str = "0123456789abcdef"
    pipeline: Any = field(default_factory=_NoTowers)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], settings: SynthesizeSettings) -> Drawn:
        assert len(prompts) <= settings.batch_size
        self.before(len(self.calls))
        self.calls.append(len(prompts))
        images = [self.instead.get(seed, patches(seed)) for seed in seeds]
        flagged = [self.unsafe(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return Drawn(np.stack(images), np.array(flagged, bool))

    def perturb(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        seeds: Sequence[int],
        strength: float,
        settings: SynthesizeSettings,
    ) -> Drawn:
        painted = self.generate(prompts, seeds, settings)
        mixed = (1 - strength) * np.stack([image[:SIDE, :SIDE] for image in images]) + strength * painted.images
        return Drawn(mixed.astype(np.uint8), painted.unsafe)


def _painter() -> Any:
    return Painter()


@dataclass(frozen=True)
class Painters:
    """Several of them, each in a process of its own."""

    count: int
    name: str = "painter@1"
    fingerprint: str = "0123456789abcdef"

    def loads(self, settings: SynthesizeSettings, shards: int) -> list[Callable[[], Any]]:
        return [partial(_painter)] * min(self.count, shards)
