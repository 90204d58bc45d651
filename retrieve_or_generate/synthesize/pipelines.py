"""Generators: pipelines that diffusers loads, from the package, a folder, or a model hub at a commit; safetensors only.

Whatever is wrong with one ends in one line before anything is generated, and nothing is ever unpickled: pickled weights are refused
by their names, and code that a folder brings along is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.pocket import patch_vae  # noqa: F401  (diffusers loads a class by name only if it is imported)
from retrieve_or_generate.precision import native
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.pipeline_files import CHECKER, check_part, fetch, read_index
from retrieve_or_generate.synthesize.unsaid import unsaid
from retrieve_or_generate.weights import check_pocket_weights, find_generator, first_line

_AT_ONCE = 8  # images
# Its noise comes from a tree of its own, not from the images' generators.
_OTHER_NOISE = frozenset({"DPMSolverSDEScheduler"})


@dataclass(frozen=True)
class SafetyChecker:
    """The checker that came with a pipeline, apart from it: in float32, so that its verdict depends on no dtype."""

    network: torch.nn.Module
    extractor: Any

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, h, w, 3) uint8 to (n,) bool: whether it would black the image out, whatever stands beside it."""
        parts = [self._verdicts(images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE)]
        return np.concatenate([np.zeros(0, bool), *parts])

    def _verdicts(self, images: np.ndarray) -> np.ndarray:
        """Always of `_AT_ONCE` images, so that an image's scores follow from it alone."""
        pictures = [Image.fromarray(image) for image in images]
        padded = pictures + [Image.new("RGB", pictures[0].size)] * (_AT_ONCE - len(pictures))
        pixels = self.extractor(padded, return_tensors="pt").pixel_values
        blank = [np.zeros((1, 1, 3), np.float32)] * len(padded)  # to blacken; the verdict alone is wanted
        with unsaid():
            _, verdicts = self.network(clip_input=pixels.to(next(self.network.parameters()).device), images=blank)
        return np.array(verdicts[: len(images)], bool)


@dataclass(frozen=True)
class Pipeline:
    """A text-to-image pipeline on its device, in evaluation mode and quiet, without its safety checker."""

    name: str
    """As it is recorded with each image: `weights.GeneratorFiles.name`."""
    fingerprint: str
    """16 hex digits of the files; the settings that it was loaded with are not in it."""
    text: DiffusionPipeline
    image: DiffusionPipeline | None
    """The same weights as an image-to-image pipeline with a `strength`; None where diffusers has none."""
    size: int
    """Side in pixels of the images that it was trained on."""
    multiple: int
    """What a side in pixels is a multiple of."""
    device: torch.device
    checker: SafetyChecker | None

    def side(self, settings: SynthesizeSettings) -> int:
        """The side in pixels that is generated; `UsageError` if the pipeline cannot make it."""
        side = settings.resolution or self.size
        if side % self.multiple:
            below = side - side % self.multiple
            near = f"{below} or {below + self.multiple}" if below else str(self.multiple)
            raise UsageError(
                f"synthesize.resolution: {side} is no multiple of {self.multiple}, as {self.name} needs it; take {near}"
            )
        return side


def load_pipeline(name: str, settings: SynthesizeSettings, device: str = "cpu") -> Pipeline:
    """`pocket`, a folder that diffusers wrote, or a Hub id (`ORG/NAME`, `ORG/NAME@REVISION`) as the settings ask for it.

    Raises:
        UsageError: no such pipeline, one that makes no images of text, pickled weights, or settings that it cannot take.
        IntegrityError: files that are damaged or not those recorded.
    """
    files = find_generator(name)
    if name == "pocket":
        check_pocket_weights("stable-diffusion")
    folder = files.folder or fetch(files, settings)
    index = read_index(folder, settings)
    for part, (library, _) in index.items():
        check_part(folder / part, library)
    text = _load(folder, _scheduler(folder, index, settings.scheduler), settings, torch.device(device))
    checker = _take_checker(text, device)
    made = Pipeline(
        files.name, files.fingerprint, text, _image_to_image(text), *_sides(text), torch.device(device), checker
    )
    made.side(settings)
    _prepare(made)
    return made


def _scheduler(folder: Path, index: dict[str, tuple[str, str]], wanted: str | None) -> Any:
    """The pipeline's own scheduler, or the `wanted` one with its configuration; before any weights are read."""
    kind = index.get("scheduler", ("", ""))[1]
    if not hasattr(diffusers, kind):
        raise UsageError(f"{folder}: a scheduler {kind!r}, which diffusers {diffusers.__version__} does not have")
    with unsaid():
        try:
            own = getattr(diffusers, kind).from_pretrained(folder / "scheduler")
            known = {one.__name__: one for one in own.compatibles if one.__name__ not in _OTHER_NOISE}
            if wanted is None:
                return own
            if wanted in known:
                return known[wanted].from_config(own.config)
        except Exception as error:
            raise IntegrityError(f"{folder / 'scheduler'}: not readable ({first_line(error)})") from error
    raise unknown_name("scheduler", wanted, known)


def _load(folder: Path, scheduler: Any, settings: SynthesizeSettings, device: torch.device) -> DiffusionPipeline:
    """The pipeline in the settings' dtype, its safety checker in float32. `IntegrityError` if any weight is missing or misfits."""
    unwanted = {} if settings.safety_checker else {CHECKER: None, "requires_safety_checker": False}
    dtypes = {"default": native(settings.dtype, device), CHECKER: torch.float32}
    with unsaid() as said:
        try:
            loaded = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, dtype=dtypes, scheduler=scheduler, **unwanted
            )
        except ImportError as error:
            raise UsageError(f"{folder}: needs a package that is not installed ({first_line(error)})") from error
        except Exception as error:
            if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
                raise
            raise IntegrityError(f"{folder}: diffusers cannot load it ({first_line(error)})") from error
    lacking = [message for message in said if "newly initialized" in message]
    if lacking:
        part = re.search(r"([A-Z]\w*) (were not|LOAD REPORT)", lacking[0])
        raise IntegrityError(f"{folder}: weights of its {part[1] if part else 'parts'} are missing; get it anew")
    return loaded


def _take_checker(text: DiffusionPipeline, device: str) -> SafetyChecker | None:
    """Part a pipeline from its checker, which would blacken images within its call."""
    network = getattr(text, CHECKER, None)
    if network is None:
        return None
    text.safety_checker = None
    text.register_to_config(requires_safety_checker=False)
    return SafetyChecker(network.to(device), text.feature_extractor)


def _image_to_image(text: DiffusionPipeline) -> DiffusionPipeline | None:
    try:
        with unsaid():
            image = AutoPipelineForImage2Image.from_pipe(text)
    except ValueError:
        return None  # diffusers links no such class to this one
    return image if "strength" in signature(type(image).__call__).parameters else None


def _sides(text: DiffusionPipeline) -> tuple[int, int]:
    """The side in pixels that a pipeline was trained at, and what sides are multiples of."""
    network = getattr(text, "unet", None) or text.transformer
    latents = getattr(text, "default_sample_size", None) or network.config.sample_size
    side = max(latents) if isinstance(latents, list | tuple) else latents
    multiple = max(text.image_processor.config.vae_scale_factor, text.vae_scale_factor * getattr(text, "patch_size", 1))
    return int(side * text.vae_scale_factor), int(multiple)


def _prepare(made: Pipeline) -> None:
    """To its device, quiet from now on, and without SDXL's watermark, which would depend on what else is installed."""
    try:
        with unsaid():
            made.text.to(made.device)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{made.name}: more than the memory of {made.device} holds; try synthesize.dtype=bfloat16, or another --device"
        ) from error
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # they would say of every prompt how much of it the text tower takes
    for pipeline in (made.text, made.image):
        if pipeline is not None:
            pipeline.set_progress_bar_config(disable=True)
            if hasattr(pipeline, "watermark"):
                pipeline.watermark = None
