"""Synthetic image sets that match a retrieved one, and retrieved images perturbed by strength.

Reads an image set (`like` or `init`) and a generator; writes an image set folder (`image_set.py`) and curates it by the same code
as a retrieved one. As many candidates are generated as the same CLIP-score filter needs to leave equal numbers in each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieve_or_generate.curate import curate
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import CurateSettings, SynthesizeSettings
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter, finished_image_set
from retrieve_or_generate.models import Clip
from retrieve_or_generate.pixels import decode, encode_jpeg, to_square
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts import prompts_for
from retrieve_or_generate.synthesize.sampler import Generator, load_generator
from retrieve_or_generate.tasks import Task

__all__ = ["Generator", "load_generator", "perturb", "synthesize"]

Progress = Callable[[int, int], None]
_VERSION = 1  # part of every key: raise when the same settings give other images
_MARGIN = 1.1  # candidates beyond what the filter alone asks for, for copies that are dropped
_STILL_IN = ("", "clip_score", "class_cap")  # reasons that say nothing against an image as such


@dataclass(frozen=True)
class _Request:
    """One image to make."""

    key: str
    label: int
    prompt: str
    seed: int


def _config(task: Task, of: ImageSet, generator: Generator, clip: Clip, settings: SynthesizeSettings, **more: Any) -> dict[str, Any]:
    """What the set follows from; its content key is the set's key. Batch size is left out: it changes no image."""
    return {
        "version": _VERSION,
        "task": task.fingerprint,
        "of": of.key,
        "generator": {"name": generator.name, "fingerprint": generator.fingerprint},
        "clip": {"name": clip.name, "fingerprint": clip.fingerprint},
        "synthesize": settings.model_dump(mode="json", exclude={"batch_size"}),
        **more,
    }


def synthesize(
    task: Task,
    like: ImageSet,
    generator: Generator,
    clip: Clip,
    out: Path,
    settings: SynthesizeSettings,
    curation: CurateSettings,
    progress: Progress | None = None,
) -> ImageSet:
    """A synthetic image set with the class counts of `like`, in folder `out`; a finished one with the same inputs is returned as it is.

    `progress` is called with images done and images in all. Raises `UsageError` if `like` is of another task.
    """
    if like.task != task.name:
        raise UsageError(f"{like.folder}: an image set of task {like.task!r}, not {task.name!r}")
    config = _config(task, like, generator, clip, settings, curate=curation.model_dump(mode="json"))
    if done := finished_image_set(out, content_key(config)):
        return done
    kept = like.counts()
    requests = [
        _Request(f"{label:04d}-{i:06d}", label, prompt, seed_for("synthesize", "noise", task.name, task.class_names[label], i))
        for label, count in enumerate(kept)
        for i, prompt in enumerate(prompts_for(settings.prompts, task, label, _needed(int(count), curation)))
    ]
    with ImageSetWriter(
        out, task=task.name, source="synthetic", key=content_key(config), class_names=task.class_names, config=config
    ) as writer:
        for first, part in _parts(requests, settings.batch_size):
            images = generator.generate([r.prompt for r in part], [r.seed for r in part], settings)
            for request, image in zip(part, images, strict=True):
                _add(writer, request, image, generator)
            if progress:
                progress(first + len(part), len(requests))
        writer.finish()
    return curate(out, task=task, clip=clip, settings=curation, most=kept)


def perturb(
    task: Task,
    init: ImageSet,
    generator: Generator,
    clip: Clip,
    out: Path,
    strength: float,
    settings: SynthesizeSettings,
    curation: CurateSettings,
    progress: Progress | None = None,
) -> ImageSet:
    """The images of `init` perturbed by `strength` (the γ of 2406.05184, section 5.1) and curated anew.

    Every candidate of `init` is perturbed that was not dropped as unfit, so the same filter leaves as many. An image's noise
    follows from its key: it is the same at every strength.
    """
    if init.task != task.name:
        raise UsageError(f"{init.folder}: an image set of task {init.task!r}, not {task.name!r}")
    if not 0 <= strength <= 1:
        raise UsageError(f"strength {strength}: a number from 0 to 1")
    config = _config(task, init, generator, clip, settings, curate=curation.model_dump(mode="json"), strength=strength)
    if done := finished_image_set(out, content_key(config)):
        return done
    rows = init.manifest[init.manifest["reason"].isin(_STILL_IN)]
    requests = [
        _Request(row.key, row.label, task.templates[0].replace("{}", row.class_name), seed_for("synthesize", "perturb", task.name, row.key))
        for row in rows.itertuples()
    ]
    with ImageSetWriter(
        out, task=task.name, source="perturbed", key=content_key(config), class_names=task.class_names, config=config
    ) as writer:
        for first, part in _parts(requests, settings.batch_size):
            before = np.stack([to_square(decode(data), generator.size) for data in init.images([r.key for r in part])])
            images = generator.perturb(before, [r.prompt for r in part], [r.seed for r in part], strength, settings)
            for request, image in zip(part, images, strict=True):
                _add(writer, request, image, generator, strength)
            if progress:
                progress(first + len(part), len(requests))
        writer.finish()
    return curate(out, task=task, clip=clip, settings=curation, most=init.counts())


def _needed(kept: int, curation: CurateSettings) -> int:
    """Candidates of a class from which the filter keeps at least `kept`."""
    return math.ceil(kept / curation.keep_fraction * _MARGIN)


def _parts(requests: list[_Request], size: int) -> Iterator[tuple[int, list[_Request]]]:
    for first in range(0, len(requests), size):
        yield first, requests[first : first + size]


def _add(writer: ImageSetWriter, request: _Request, image: np.ndarray, generator: Generator, strength: float = math.nan) -> None:
    origin: dict[str, Any] = {"generator": generator.name, "seed": request.seed}
    writer.add(
        key=request.key,
        label=request.label,
        caption=request.prompt,
        origin=origin,
        query=request.prompt,
        image=encode_jpeg(image),
        strength=strength,
    )
