"""Images from prompts, and from images, through a diffusers pipeline: batches, memory, sizes, unsafe images.

One CPU generator an image, so an image depends on its prompt and its seed alone: to float tolerance whatever the batch size, bit by
bit at one batch size, whatever the order, the neighbours and the number of images (every batch is filled up).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pixels import to_square
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.pipelines import Pipeline, load_pipeline
from retrieve_or_generate.synthesize.plain import PlainCalls
from retrieve_or_generate.synthesize.unet_loop import UnetLoop, fits_loop

Progress = Callable[[int], None]
"""Called with the number of images that a batch added."""

_LOADED_WITH = ("scheduler", "dtype", "resolution", "safety_checker")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """`images` (n, s, s, 3) uint8; `unsafe` (n,) bool: what the generator's own checker would black out."""

    images: np.ndarray
    unsafe: np.ndarray


class Sampler(Protocol):
    """How a batch is made: (n, 3, s, s) in [0, 1], on the device."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SynthesizeSettings) -> Tensor: ...

    def redraw(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        strength: float,
        settings: SynthesizeSettings,
    ) -> Tensor: ...


def steps_at(strength: float, settings: SynthesizeSettings) -> int:
    """How many of the denoising steps `strength` asks for, as diffusers counts them; 0: the autoencoder alone."""
    return min(int(settings.num_inference_steps * strength), settings.num_inference_steps)


class Generator:
    """A text-to-image pipeline, and the same weights as an image-to-image one.

    `size` is the side in pixels of what it makes. The settings of a call agree with those of loading in what decides on loading:
    scheduler, dtype, resolution and safety checker.
    """

    def __init__(self, pipeline: Pipeline, settings: SynthesizeSettings):
        self.name, self.fingerprint, self.size = pipeline.name, pipeline.fingerprint, pipeline.side(settings)
        self.pipeline, self.loaded_with = pipeline, settings
        fast = fits_loop(pipeline.text)
        self._sampler: Sampler = (
            UnetLoop(pipeline.text, settings.compile)
            if fast
            else PlainCalls(pipeline.name, pipeline.text, pipeline.image)
        )
        self._said: set[str] = set()
        self._most: int | None = None  # images in a batch that memory holds, once it has held too few

    def serves(self, settings: SynthesizeSettings) -> bool:
        """Whether it was loaded as such `settings` ask for."""
        return all(getattr(settings, name) == getattr(self.loaded_with, name) for name in _LOADED_WITH)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SynthesizeSettings,
        progress: Progress | None = None,
    ) -> Drawn:
        """One image per prompt and seed. `UsageError` if memory does not hold a single one."""

        def make(rows: Sequence[int]) -> Tensor:
            return self._sampler.draw([prompts[i] for i in rows], [seeds[i] for i in rows], self.size, settings)

        return self._in_batches(make, len(prompts), settings, progress)

    @torch.inference_mode()
    def perturb(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        prompts: Sequence[str],
        seeds: Sequence[int],
        strength: float,
        settings: SynthesizeSettings,
        progress: Progress | None = None,
    ) -> Drawn:
        """Image-to-image: noise `images`, (h, w, 3) uint8 each, to `strength` in [0, 1] and denoise them.

        Each goes the one road of every image to a square of the generator's size (`pixels.to_square`). Where `strength` asks for
        less than one step, it goes through the autoencoder alone.
        """
        steps = steps_at(strength, settings)
        if strength and not steps:
            self._say(
                f"strength {strength:g} of {settings.num_inference_steps} steps is less than one: images go through the "
                "autoencoder alone, as at strength 0"
            )

        def make(rows: Sequence[int]) -> Tensor:
            squares = np.stack([to_square(images[i], self.size) for i in rows])
            pixels = torch.from_numpy(squares).to(self.pipeline.device).permute(0, 3, 1, 2).float() / 255
            if not steps:
                return self._round_trip(pixels)
            chosen = [prompts[i] for i in rows], [seeds[i] for i in rows]
            return self._sampler.redraw(pixels, *chosen, strength, settings)

        return self._in_batches(make, len(prompts), settings, progress)

    def _in_batches(
        self,
        make: Callable[[Sequence[int]], Tensor],
        count: int,
        settings: SynthesizeSettings,
        progress: Progress | None,
    ) -> Drawn:
        """Rows 0 to `count` by `make`, which is always asked for a whole batch: the last one repeats its last row."""
        assert self.serves(settings)
        parts: list[Drawn] = []
        start = 0
        while start < count:
            size = min(settings.batch_size, self._most or settings.batch_size)
            here = min(size, count - start)
            made = self._tried(make, [start + min(i, here - 1) for i in range(size)], here, settings)
            if made is None:
                self._halve(size)
                continue
            parts.append(made)
            start += here
            if progress:
                progress(here)
        side = settings.stored_size or self.size
        images = [np.zeros((0, side, side, 3), np.uint8), *(part.images for part in parts)]
        return Drawn(np.concatenate(images), np.concatenate([np.zeros(0, bool), *(part.unsafe for part in parts)]))

    def _tried(
        self, make: Callable[[Sequence[int]], Tensor], rows: Sequence[int], here: int, settings: SynthesizeSettings
    ) -> Drawn | None:
        """The first `here` of `rows`; None if memory did not hold them."""
        try:
            return self._finished(make(rows)[:here], settings)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not _is_lack_of_memory(error):
                raise
            return None

    def _halve(self, size: int) -> None:
        """Half a batch from now on; said at the first time."""
        device = self.pipeline.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise UsageError(
                f"{self.name}: the memory of {device} does not hold one image of {self.size} pixels; give a smaller "
                "synthesize.resolution, synthesize.dtype=bfloat16, or another --device"
            )
        if self._most is None:
            self._say(f"out of memory with {size} images at once: on with fewer, which changes no image")
        self._most = size // 2

    def _say(self, message: str) -> None:
        """Once, however many batches it is true of."""
        if message not in self._said:
            self._said.add(message)
            _log.warning(message)

    def _finished(self, images: Tensor, settings: SynthesizeSettings) -> Drawn:
        """Checked at the size they were made, then brought to the size that is stored, on the device."""
        checker = self.pipeline.checker
        unsafe = checker(_to_uint8(images)) if checker and settings.safety_checker else np.zeros(len(images), bool)
        if settings.stored_size and settings.stored_size != images.shape[-1]:
            side = (settings.stored_size, settings.stored_size)
            images = F.interpolate(images.float(), side, mode="bicubic", antialias=True)
        return Drawn(_to_uint8(images), unsafe)

    def _round_trip(self, pixels: Tensor) -> Tensor:
        """Through the autoencoder and back, by the mean of what it encodes to: no noise."""
        vae = self.pipeline.text.vae
        latents = vae.encode((2 * pixels - 1).to(vae.dtype)).latent_dist.mode()
        return vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5


def load_generator(name: str = "pocket", device: str = "cpu", settings: SynthesizeSettings | None = None) -> Generator:
    """`pocket`, a folder that diffusers can load, or a Hub id, for calls with such `settings`.

    Raises:
        UsageError: no pipeline there. IntegrityError: weights that are not those recorded, or not readable.
    """
    wanted = settings or SynthesizeSettings()
    if wanted.dtype == "float16" and torch.device(device).type == "cpu":
        raise UsageError("synthesize.dtype: float16 takes hours on a CPU; take bfloat16 or float32")
    return Generator(load_pipeline(name, wanted, device), wanted)


def _is_lack_of_memory(error: BaseException) -> bool:
    """torch says so by a class of its own on a GPU, and by words of its allocator on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _to_uint8(images: Tensor) -> np.ndarray:
    """(b, 3, h, w) in [0, 1] to (b, h, w, 3) uint8."""
    levels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
