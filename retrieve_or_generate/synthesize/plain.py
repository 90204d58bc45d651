"""Sampling by a pipeline's own call: for every pipeline of diffusers that makes images of text, whatever is inside.

One generator an image, on the CPU, goes into the call; noise is drawn in the pipeline's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.settings import SynthesizeSettings


class PlainCalls:
    """Samples from a text-to-image pipeline and, where there is one, the image-to-image pipeline with its weights."""

    def __init__(self, name: str, text: DiffusionPipeline, image: DiffusionPipeline | None):
        self._name, self._text, self._image = name, text, image

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SynthesizeSettings) -> Tensor:
        """Images of `prompts` from noise: (n, 3, side, side) in [0, 1]."""
        arguments = self._arguments(self._text, prompts, seeds, side, settings)
        return self._text(**arguments).images

    def redraw(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        strength: float,
        settings: SynthesizeSettings,
    ) -> Tensor:
        """(n, 3, s, s) `images` in [0, 1], noised to `strength` and denoised; the same shape."""
        if self._image is None:
            raise UsageError(f"{self._name}: diffusers has no image-to-image pipeline for it, so it perturbs nothing")
        arguments = self._arguments(self._image, prompts, seeds, images.shape[-1], settings)
        return self._image(image=images, strength=strength, **arguments).images

    def _arguments(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        side: int,
        settings: SynthesizeSettings,
    ) -> dict[str, Any]:
        taken = signature(type(pipeline).__call__).parameters
        arguments: dict[str, Any] = {
            "prompt": list(prompts),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "output_type": "pt",
        }
        optional = {"height": side, "width": side, "eta": settings.eta}
        arguments |= {name: value for name, value in optional.items() if name in taken}
        if settings.negative_prompt:
            # where guidance is an input of the network (FLUX), a negative prompt has no branch to stand in
            if "negative_prompt" not in taken or "true_cfg_scale" in taken:
                raise UsageError(f"{self._name}: takes no negative prompt; leave synthesize.negative_prompt empty")
            arguments["negative_prompt"] = [settings.negative_prompt] * len(prompts)
        return arguments
