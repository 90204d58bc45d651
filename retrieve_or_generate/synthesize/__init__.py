"""Synthetic image sets that match a retrieved one, and retrieved images perturbed by strength.

Reads an image set (`like` or `init`) and a generator; writes an image set folder (`image_set.py`) and curates it by the same code
as a retrieved one. As many candidates are generated as the same CLIP-score filter needs to leave equal numbers in each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieve_or_generate.curate.curation import curate
from retrieve_or_generate.curate.descriptor import find_descriptor
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter, candidates_record
from retrieve_or_generate.models import Clip
from retrieve_or_generate.pixels import decode, encode_jpeg, to_square
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import CurateSettings, SynthesizeSettings
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy
from retrieve_or_generate.synthesize.sampler import Generator, load_generator
from retrieve_or_generate.tasks.base import Task

__all__ = ["Generator", "load_generator", "perturb", "synthesize"]

Progress = Callable[[int, int], None]
_VERSION = 1  # part of every key: raise when the same settings give other images
_STILL_IN = ("", "duplicate", "clip_score", "class_cap")  # reasons that say nothing against an image as such


@dataclass(frozen=True)
class _Request:
    """One image to make, from a prompt or, with `init_key`, from an image."""

    key: str
    label: int
    prompt: str
    seed: int
    init_key: str | None = None


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
    """A synthetic image set with the class counts of `like`, in folder `out`.

    A finished one with the same inputs is opened as it is. `progress` is called with images done and images in all. Raises
    `UsageError` if `like` is of another task, or `out` holds something else.
    """
    _same_task(task, like)
    find_descriptor(curation)  # weights that are not there are told of before anything is generated
    strategy = load_strategy(PromptSource(task, like, settings.prompts))
    requests = [
        _Request(
            f"{label:04d}-{i:06d}",
            label,
            prompt.text,
            seed_for("synthesize", "noise", task.name, task.class_names[label], i),
        )
        for label, kept in enumerate(like.counts())
        for i, prompt in enumerate(strategy.prompts(label, _candidates(int(kept), curation)))
    ]
    config = _config(task, like, generator, settings) | {"keep_fraction": curation.keep_fraction}
    config |= {"prompts": strategy.fingerprint}

    def images_of(part: Sequence[_Request]) -> np.ndarray:
        return generator.generate([r.prompt for r in part], [r.seed for r in part], settings)

    _write(out, task, "synthetic", config, requests, images_of, settings.batch_size, progress)
    return curate(out, task=task, clip=clip, settings=curation, excluded=like.excluded)


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
    first: int | None = None,
) -> ImageSet:
    """The images of `init` perturbed by `strength` (the γ of 2406.05184, section 5.1) and curated anew.

    Every candidate of `init` that was fit to be used is perturbed, so that the same filter leaves as many; with `first`, only that
    many kept images of each class. An image's noise follows from its key, so it is the same at every strength.
    """
    _same_task(task, init)
    find_descriptor(curation)
    if not 0 <= strength <= 1:
        raise UsageError(f"strength {strength}: a number from 0 to 1")
    rows = init.manifest[init.manifest["reason"].isin(_STILL_IN) & ~init.manifest["class_name"].isin(init.excluded)]
    if first is not None:
        curation = curation.model_copy(update={"least_per_class": 0})  # a sample to look at, not a set to train on
        rows = rows[(rows["rank"] >= 0) & (rows["rank"] < first)]
    requests = [
        _Request(
            key,
            label,
            task.templates[0].replace("{}", task.class_names[label]),
            seed_for("perturb", "noise", task.name, key),
            key,
        )
        for key, label in zip(rows["key"], rows["label"], strict=True)
    ]
    config = _config(task, init, generator, settings) | {"strength": strength, "first": first}

    def images_of(part: Sequence[_Request]) -> np.ndarray:
        encoded = init.images([r.key for r in part])
        before = np.stack([to_square(decode(data), generator.size) for data in encoded])
        return generator.perturb(before, [r.prompt for r in part], [r.seed for r in part], strength, settings)

    _write(out, task, "perturbed", config, requests, images_of, settings.batch_size, progress, strength)
    return curate(out, task=task, clip=clip, settings=curation, excluded=init.excluded)


def _same_task(task: Task, given: ImageSet) -> None:
    if (given.task, given.class_names) != (task.name, task.class_names):
        raise UsageError(
            f"{given.folder}: an image set of task {given.task!r}, not of {task.name!r} with these classes"
        )


def _candidates(kept: int, curation: CurateSettings) -> int:
    """How many of a class to generate so that the filter, which rounds up, keeps `kept` of them."""
    return math.floor(round(kept / (curation.keep_fraction or 1), 9))


def _config(task: Task, of: ImageSet, generator: Generator, settings: SynthesizeSettings) -> dict[str, Any]:
    """What the candidates follow from. Batch size is left out: it changes no image."""
    return {
        "version": _VERSION,
        "task": task.fingerprint,
        "of": of.record["files"]["manifest.parquet"]["sha256"],
        "generator": {"name": generator.name, "fingerprint": generator.fingerprint},
        "synthesize": settings.model_dump(mode="json", exclude={"batch_size"}),
    }


def _write(
    out: Path,
    task: Task,
    source: str,
    config: dict[str, Any],
    requests: Sequence[_Request],
    images_of: Callable[[Sequence[_Request]], np.ndarray],
    batch_size: int,
    progress: Progress | None,
    strength: float = math.nan,
) -> None:
    """Make the images batch by batch and seal them as candidates, unless `out` holds just these already."""
    key = content_key(config)
    if candidates_record(out, key) is not None:
        return
    generator = config["generator"]["name"]
    with ImageSetWriter(
        out, task=task.name, source=source, key=key, class_names=task.class_names, config=config
    ) as writer:
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            for request, image in zip(part, images_of(part), strict=True):
                origin: dict[str, Any] = {"generator": generator, "seed": request.seed}
                if request.init_key is not None:
                    origin["init_key"] = request.init_key
                writer.add(
                    key=request.key,
                    label=request.label,
                    caption=request.prompt,
                    origin=origin,
                    query=request.prompt,
                    image=encode_jpeg(image),
                    strength=strength,
                )
            if progress:
                progress(start + len(part), len(requests))
        writer.finish()
