"""The sampling loop of Stable Diffusion 1 and 2: diffusers' scheduler, our UNet (`unet.py`), less work for the same images.

Gives what `StableDiffusionPipeline` and `StableDiffusionImg2ImgPipeline` give from the same generators, to the rounding of the
network's type. The network alone runs in that type: latents between steps, noise and guidance are float32. Noise is drawn on the
CPU, one generator an image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.unet import Guide, Unet, fits

_PROMPTS_AT_ONCE = 16  # always so many, so that a prompt's states do not depend on those beside it
_PROMPTS_KEPT = 512  # a task's own prompts; captions, of which each image has another, pass through
_DECODED_AT_ONCE = 8  # images: the autoencoder needs a gigabyte for each two of 512² in float16
_Network = Callable[[Tensor, Tensor, Guide], Tensor]


def fits_loop(pipeline: Any) -> bool:
    """Whether `pipeline` is a Stable Diffusion 1 or 2 for which this loop gives the images of its own call."""
    return type(pipeline) is StableDiffusionPipeline and fits(pipeline.unet) and pipeline.image_encoder is None


class UnetLoop:
    """Samples from `pipeline`, which must fit. `compiled` has torch compile the network for each batch size, at its first use."""

    def __init__(self, pipeline: StableDiffusionPipeline, compiled: bool = False):
        assert fits_loop(pipeline)
        self._pipeline, self._scheduler, self._vae = pipeline, pipeline.scheduler, pipeline.vae
        self._device = pipeline.unet.device
        pipeline.unet.to(memory_format=torch.channels_last)
        self._unet = Unet(pipeline.unet)
        self._network: _Network = torch.compile(self._unet.__call__, dynamic=False) if compiled else self._unet
        self._states: OrderedDict[str, Tensor] = OrderedDict()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SynthesizeSettings) -> Tensor:
        """Images of `prompts` from noise: (n, 3, side, side) in [0, 1]."""
        return self._decode(self.latents(prompts, seeds, side, settings))

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SynthesizeSettings) -> Tensor:
        """What the autoencoder makes images of, (n, channels, h, w) float32: diffusers' `output_type="latent"`."""
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(sources, side)
        self._scheduler.set_timesteps(settings.num_inference_steps, device=self._device)
        noise = noise * self._scheduler.init_noise_sigma
        return self._denoise(noise, self._scheduler.timesteps, prompts, sources, settings)

    def redraw(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        strength: float,
        settings: SynthesizeSettings,
    ) -> Tensor:
        """(n, 3, s, s) `images` in [0, 1], noised to `strength` and denoised; the same shape."""
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        posterior = self._vae.encode((2 * images - 1).to(self._vae.dtype)).latent_dist
        clean = self._sample(posterior, sources) * self._vae.config.scaling_factor
        noise = self._noise(sources, images.shape[-1])
        self._scheduler.set_timesteps(settings.num_inference_steps, device=self._device)
        timesteps = self._last(int(settings.num_inference_steps * strength), settings)
        latents = self._scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(images)))
        return self._decode(self._denoise(latents, timesteps, prompts, sources, settings))

    def _last(self, steps: int, settings: SynthesizeSettings) -> Tensor:
        """The last `steps` steps of the scheduler, which is told where it starts."""
        first = (settings.num_inference_steps - steps) * self._scheduler.order
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(first)
        return self._scheduler.timesteps[first:]

    def _noise(self, sources: Sequence[torch.Generator], side: int) -> Tensor:
        """(n, channels, h, w) float32 on the device, each row from its own generator on the CPU."""
        side //= self._pipeline.vae_scale_factor
        shape = (1, self._pipeline.unet.config.in_channels, side, side)
        return torch.cat([torch.randn(shape, generator=source) for source in sources]).to(self._device)

    def _sample(self, posterior: DiagonalGaussianDistribution, sources: Sequence[torch.Generator]) -> Tensor:
        """A draw from the posterior of each image, float32."""
        shape = (1, *posterior.mean.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=source) for source in sources]).to(self._device)
        return posterior.mean.float() + posterior.std.float() * noise

    def _denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompts: Sequence[str],
        sources: Sequence[torch.Generator],
        settings: SynthesizeSettings,
    ) -> Tensor:
        guided = settings.guidance_scale > 1  # diffusers' meaning: at 1 and below the prompt's own prediction
        guide = self._guide(prompts, settings.negative_prompt if guided else None)
        times = self._unet.times(timesteps)
        options = self._step_options(sources, settings)
        for i, t in enumerate(timesteps):
            seen = self._scheduler.scale_model_input(latents, t)
            predicted = self._network(seen, times[i : i + 1], guide).float()
            if guided:
                away, towards = predicted.chunk(2)
                predicted = away + settings.guidance_scale * (towards - away)
            latents = self._scheduler.step(predicted, t, latents, **options, return_dict=False)[0]
        return latents

    def _step_options(self, sources: Sequence[torch.Generator], settings: SynthesizeSettings) -> dict[str, Any]:
        """What this scheduler's step takes of the noise that DDIM's eta asks for, and of generators."""
        offered = {"eta": settings.eta, "generator": list(sources)}
        taken = signature(self._scheduler.step).parameters
        return {name: value for name, value in offered.items() if name in taken}

    def _guide(self, prompts: Sequence[str], away_from: str | None) -> Guide:
        """Each different prompt is embedded once, and its keys and values are worked out once."""
        different = list(dict.fromkeys(prompts))
        states = self._embed(different)
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=self._device)
        return self._unet.guide(states, rows, None if away_from is None else self._embed([away_from]))

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """(n, tokens, width) hidden states in the network's type; a prompt seen lately is looked up."""
        new = [prompt for prompt in prompts if prompt not in self._states]
        fresh: dict[str, Tensor] = {}
        for start in range(0, len(new), _PROMPTS_AT_ONCE):
            part = new[start : start + _PROMPTS_AT_ONCE]
            padded = part + [part[-1]] * (_PROMPTS_AT_ONCE - len(part))
            states, _ = self._pipeline.encode_prompt(padded, self._device, 1, do_classifier_free_guidance=False)
            fresh |= zip(part, states.to(self._pipeline.unet.dtype), strict=False)
        found = torch.stack([fresh[prompt] if prompt in fresh else self._states[prompt] for prompt in prompts])
        self._states.update(fresh)
        while len(self._states) > _PROMPTS_KEPT:
            self._states.popitem(last=False)
        return found

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = (latents / self._vae.config.scaling_factor).to(self._vae.dtype)
        parts = [self._vae.decode(part, return_dict=False)[0] for part in scaled.split(_DECODED_AT_ONCE)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)
