"""Generators: pipelines that diffusers loads, from the package, a folder, or a model hub at a commit; safetensors only.

Whatever is wrong with one ends in one line before anything is generated, and nothing is ever unpickled: pickled weights are refused
by their names, and code that a folder brings along is not run.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image
from safetensors import SafetensorError, safe_open

from retrieve_or_generate.errors import FULL, IntegrityError, UsageError, unknown_name
from retrieve_or_generate.pocket import patch_vae  # noqa: F401  (diffusers loads a class by name only if it is imported)
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.store import read_json
from retrieve_or_generate.weights import (
    PICKLED,
    PIPELINE_INDEX,
    PLAIN_WEIGHTS,
    GeneratorFiles,
    check_pocket_weights,
    find_generator,
    first_line,
    hub_problem,
)

_CHECKER = "safety_checker"
_AT_ONCE = 8  # images
_LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "accelerate")
_OURS = "retrieve_or_generate.pocket."  # the pocket autoencoder
_OTHER_NOISE = frozenset(
    {"DPMSolverSDEScheduler"}
)  # its noise comes from a tree of its own, not from the images' generators


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
        blank = [np.zeros((1, 1, 3), np.float32)] * len(
            padded
        )  # it blackens what it is given, and we need the verdict alone
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
    folder = files.folder or _download(files, settings)
    index = _read_index(folder, settings)
    for part, (library, _) in index.items():
        _check_part(folder / part, library)
    text = _load(folder, _scheduler(folder, index, settings.scheduler), settings)
    checker = _take_checker(text, device)
    made = Pipeline(
        files.name, files.fingerprint, text, _image_to_image(text), *_sides(text), torch.device(device), checker
    )
    made.side(settings)
    _prepare(made)
    return made


def _download(files: GeneratorFiles, settings: SynthesizeSettings) -> Path:
    """The snapshot of a commit in the hub's cache on this machine, completed where something is missing."""
    unwanted = {} if settings.safety_checker else {_CHECKER: None}
    asked = {"revision": files.revision, "use_safetensors": True, **unwanted}
    with unsaid():
        try:
            return Path(DiffusionPipeline.download(files.repository, local_files_only=True, **asked))
        except (OSError, ValueError):
            pass  # not all of it is here
        try:
            return Path(DiffusionPipeline.download(files.repository, **asked))
        except Exception as error:
            raise _not_given(files, error) from error


def _not_given(files: GeneratorFiles, error: Exception) -> Exception:
    if isinstance(error, EntryNotFoundError):
        return UsageError(f"{files.name}: no {PIPELINE_INDEX}, so it is no pipeline of diffusers")
    if "safetensors" in str(error):
        return UsageError(
            f"{files.name}: its weights are pickled, which are never read; ask for a revision with safetensors"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return error
    return hub_problem(files.name, error)


def _read_index(folder: Path, settings: SynthesizeSettings) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that are to be loaded: library and class by name. `UsageError` if it makes no images of text."""
    index = read_json(folder / PIPELINE_INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str):
        raise UsageError(f"{folder / PIPELINE_INDEX}: no pipeline of diffusers' own (_class_name: {kind!r})")
    known = {one.__name__ for one in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() if "Control" not in one.__name__}
    if kind not in known or "vae" not in index:
        raise UsageError(
            f"{folder}: a {kind}, which makes no images of text alone in latents of a VAE; give a pipeline such as "
            "StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline or FluxPipeline"
        )
    parts = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    unwanted = () if settings.safety_checker else (_CHECKER,)
    return {name: value for name, value in parts.items() if None not in value and name not in unwanted}


def _check_part(folder: Path, library: str) -> None:
    """`UsageError` if a part of a pipeline is not there, pickled or brings code; `IntegrityError` if it is damaged."""
    if (
        library not in ("diffusers", "transformers")
        and not hasattr(diffusers.pipelines, library)
        and _OURS not in library
    ):
        raise UsageError(f"{folder}: of library {library!r}; parts of diffusers and transformers are loaded, no others")
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: missing, though {PIPELINE_INDEX} names it")
    weights = [path for path in sorted(folder.iterdir()) if PLAIN_WEIGHTS.fullmatch(path.name)]
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
    if pickled and not weights:
        raise UsageError(
            f"{folder}: pickled weights ({pickled[0]}), which can run code and are never read; give a pipeline saved as safetensors"
        )
    for path in weights:
        _check_safetensors(path)
    for path in folder.glob("*.safetensors.index.json"):
        _check_shards(path)


def _check_safetensors(path: Path) -> None:
    """That the header is whole and the file as long as it says."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: damaged ({first_line(error)}); get it anew") from error


def _check_shards(path: Path) -> None:
    shards = read_json(path).get("weight_map", {}).values()
    for shard in sorted(set(shards)):
        if not PLAIN_WEIGHTS.fullmatch(shard):
            raise UsageError(f"{path}: names {shard!r}, which is no safetensors file beside it")
        if not (path.parent / shard).is_file():
            raise IntegrityError(f"{path.parent / shard}: missing, though {path.name} names it")


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


def _load(folder: Path, scheduler: Any, settings: SynthesizeSettings) -> DiffusionPipeline:
    """The pipeline in the settings' dtype, its safety checker in float32. `IntegrityError` if any weight is missing or misfits."""
    unwanted = {} if settings.safety_checker else {_CHECKER: None, "requires_safety_checker": False}
    dtypes = {"default": getattr(torch, settings.dtype), _CHECKER: torch.float32}
    with unsaid() as said:
        try:
            loaded = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, dtype=dtypes, scheduler=scheduler, **unwanted
            )
        except MemoryError:
            raise
        except Exception as error:
            raise IntegrityError(f"{folder}: diffusers cannot load it ({first_line(error)})") from error
    lacking = [message for message in said if "newly initialized" in message]
    if lacking:
        part = re.search(r"([A-Z]\w*) (were not|LOAD REPORT)", lacking[0])
        raise IntegrityError(f"{folder}: weights of its {part[1] if part else 'parts'} are missing; get it anew")
    return loaded


def _take_checker(text: DiffusionPipeline, device: str) -> SafetyChecker | None:
    """Part a pipeline from its checker, which would blacken images within its call."""
    network, extractor = getattr(text, _CHECKER, None), getattr(text, "feature_extractor", None)
    if network is None:
        return None
    text.safety_checker = None
    text.register_to_config(requires_safety_checker=False)
    return SafetyChecker(network.to(device), extractor) if extractor else None


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


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def unsaid() -> Iterator[list[str]]:
    """Nothing that the libraries log, warn of or draw bars for reaches the user; gives what they logged.

    Bars of downloads stay on a terminal.
    """
    kept, loggers = _Kept(), [logging.getLogger(name) for name in _LIBRARIES]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    bars = [one for one in (diffusers.utils.logging, transformers.utils.logging) if one.is_progress_bar_enabled()]
    downloads = not sys.stderr.isatty() and not are_progress_bars_disabled()
    for one in loggers:
        one.handlers[:], one.propagate = [kept], False
        one.setLevel(logging.WARNING)
    for library in bars:
        library.disable_progress_bar()
    if downloads:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield kept.messages
    finally:
        for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)
        for library in bars:
            library.enable_progress_bar()
        if downloads:
            enable_progress_bars()
