"""Images from prompts, and from images, through a diffusers pipeline.

One CPU generator per image, so an image depends on its prompt and its seed alone: not on batch size, order or device count.
Prompts are embedded once each. Pipelines are read as safetensors only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.models import plain_attention
from retrieve_or_generate.pocket import patch_vae  # noqa: F401  (diffusers loads a class by name only if it is imported)
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.weights import check_pocket_weights, generator_fingerprint, generator_folder

Progress = Callable[[int], None]


class Generator:
    """A text-to-image pipeline, and the same weights as an image-to-image one."""

    def __init__(self, name: str, pipeline: StableDiffusionPipeline, fingerprint: str, device: str):
        self.name, self.fingerprint = name, fingerprint
        self._text = pipeline.to(device)
        self._text.set_progress_bar_config(disable=True)
        self._device = torch.device(device)
        if self._device.type == "cpu":
            self._text.unet.to(memory_format=torch.channels_last)
        with _quiet():
            self._image = StableDiffusionImg2ImgPipeline(**self._text.components, requires_safety_checker=False)
        self._image.set_progress_bar_config(disable=True)
        self.size = int(self._text.unet.config.sample_size * self._text.vae_scale_factor)
        self._embedded: dict[str, torch.Tensor] = {}

    def _embed(self, prompts: Sequence[str]) -> torch.Tensor:
        """(n, tokens, width) hidden states; a prompt seen before is looked up."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embedded]
        for prompt in new:
            states, _ = self._text.encode_prompt([prompt], self._device, 1, do_classifier_free_guidance=False)
            self._embedded[prompt] = states[0]
        return torch.stack([self._embedded[prompt] for prompt in prompts])

    def _arguments(self, prompts: Sequence[str], seeds: Sequence[int], settings: SynthesizeSettings) -> dict[str, Any]:
        return {
            "prompt_embeds": self._embed(prompts),
            "negative_prompt_embeds": self._embed([""] * len(prompts)),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "eta": settings.eta,
            "output_type": "pt",
        }

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SynthesizeSettings,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """One image per prompt and seed: (n, size, size, 3) uint8."""
        parts = []
        for here in _batches(len(prompts), settings.batch_size):
            arguments = self._arguments(prompts[here], seeds[here], settings)
            with plain_attention(self._device):
                output = self._text(height=self.size, width=self.size, **arguments)
            parts.append(_to_uint8(output.images))
            _tell(progress, len(parts[-1]))
        return np.concatenate(parts)

    @torch.inference_mode()
    def perturb(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        seeds: Sequence[int],
        strength: float,
        settings: SynthesizeSettings,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Image-to-image: noise (n, size, size, 3) uint8 images to `strength` in [0, 1] and denoise them; the same shape.

        Where the strength asks for less than one step, the image goes through the autoencoder alone.
        """
        parts = []
        for here in _batches(len(prompts), settings.batch_size):
            pixels = torch.from_numpy(images[here]).permute(0, 3, 1, 2).to(self._device).float() / 255
            if int(settings.num_inference_steps * strength) < 1:
                parts.append(_to_uint8(self._round_trip(pixels)))
            else:
                arguments = self._arguments(prompts[here], seeds[here], settings)
                with plain_attention(self._device):
                    parts.append(_to_uint8(self._image(image=pixels, strength=strength, **arguments).images))
            _tell(progress, len(parts[-1]))
        return np.concatenate(parts)

    def _round_trip(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self._text.vae.encode(2 * pixels - 1).latent_dist.mode()
        return self._text.vae.decode(latents, return_dict=False)[0] / 2 + 0.5


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    """(b, 3, h, w) in [0, 1] to (b, h, w, 3) uint8."""
    array = images.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return np.rint(array * 255).astype(np.uint8)


def _tell(progress: Progress | None, count: int) -> None:
    if progress:
        progress(count)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on a pipeline that has no safety checker or a `vae` of another class."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)


def load_generator(name: str = "pocket", device: str = "cpu") -> Generator:
    """`pocket`, a folder that diffusers can load, or a Hub id.

    Raises:
        UsageError: no pipeline there. IntegrityError: weights that are not those recorded, or not readable.
    """
    if name == "pocket":
        check_pocket_weights("stable-diffusion")
    folder = generator_folder(name)
    try:
        with _quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder or name,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
                dtype=torch.float32,
            )
    except Exception as error:
        problem = str(error).strip().splitlines()[0]
        if folder is not None:
            raise IntegrityError(f"{folder}: diffusers cannot load it ({problem})") from error
        raise UsageError(
            f"unknown generator {name!r}: give 'pocket', a folder, or a Hub id of a diffusers pipeline ({problem})"
        ) from error
    return Generator(name, pipeline, generator_fingerprint(name), device)
