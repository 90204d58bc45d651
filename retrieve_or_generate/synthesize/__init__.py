"""Synthetic image sets that match a retrieved one, and retrieved images perturbed by strength.

Reads an image set (`like` or `init`) and a generator; writes an image set folder (`image_set.py`), a shard at a time (`units.py`),
and curates it by the same code as a retrieved one. As many candidates are generated as the same filter needs to leave equal numbers
in each class (`matching.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retrieve_or_generate.curate.curation import Looked, curate, curation_record
from retrieve_or_generate.curate.descriptor import find_descriptor
from retrieve_or_generate.curate.steps import Step
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import SEAL, ImageSet, candidates_record
from retrieve_or_generate.models import Clip
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.settings import CurateSettings, SynthesizeSettings
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.matching import Matching, no_more_step
from retrieve_or_generate.synthesize.memorised import KnownPool, memorised_step
from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy
from retrieve_or_generate.synthesize.requests import OWN_CAPTION, perturb_requests
from retrieve_or_generate.synthesize.sampler import Generator, load_generator
from retrieve_or_generate.synthesize.selection import left_over, selection_step
from retrieve_or_generate.synthesize.units import (
    Here,
    Maker,
    Making,
    OtherRanksError,
    Shard,
    Share,
    Workers,
    claimed,
    count_cut,
    cut,
    fill,
    finishing,
    others_left,
    seal_shards,
)
from retrieve_or_generate.tasks.base import Task

__all__ = [
    "Generator",
    "KnownPool",
    "Maker",
    "OtherRanksError",
    "Share",
    "Workers",
    "load_generator",
    "perturb",
    "synthesize",
]

_VERSION = 2  # part of every key: raise when the same settings give other images
_STILL_IN = (
    "",
    "duplicate",
    "clip_score",
    "not_selected",
    "class_cap",
)  # reasons that say nothing against an image as such
_SPEED = ("batch_size", "shard_size", "compile")  # settings that change no image
_NAMED_BY_CONTENT = (
    "file",
    "places",
    "hypernyms",
    "examples",
    "model",
)  # paths; the strategy's fingerprint is of what is there


def synthesize(
    task: Task,
    like: ImageSet,
    generator: Generator | Maker,
    clip: Clip,
    out: Path,
    settings: SynthesizeSettings,
    curation: CurateSettings,
    progress: Progress | None = None,
    *,
    known: KnownPool | None = None,
    share: Share | None = None,
) -> ImageSet:
    """A synthetic image set with the class counts of `like`, in folder `out`.

    `known` is the pool that the generator may have learned by heart.

    A finished one with the same inputs is opened as it is, one that is begun is gone on with. With a `share`, other processes fill
    the folder too; whoever then finds all images there asks for what is missing of any class, and finishes the set.

    Raises:
        UsageError: `like` is of another task, `out` holds something else or is in use, or too few images of a class are fit, unless
        the curation leaves such classes out. OtherRanksError: this share is made, others are not.
    """
    _same_task(task, like)
    find_descriptor(curation)  # weights that are not there are told of before anything is generated
    source = PromptSource(task, like, settings.prompts, str(clip.device), progress)
    maker, strategy = _maker(generator), load_strategy(source)
    steps = _steps(task, like, settings, curation, known, out, progress)
    of = _of(task, like, maker, settings) | {"prompts": strategy.fingerprint}
    key = content_key(of | {"curation": curation_record(task, clip, curation, steps)})

    def finish(looked: Looked | None = None) -> ImageSet:
        sealed = candidates_record(out, key, verify=False)
        assert sealed is not None
        excluded, told = {*like.excluded, *sealed["config"]["unfilled"]}, _curated(progress)
        return curate(
            out, task=task, clip=clip, settings=curation, excluded=excluded, steps=steps, progress=told, looked=looked
        )

    if _is_finished(out, key):
        return finish()
    making = Making(out, "synthetic", task.class_names, maker.name, settings)
    wanted = np.array([left_over(count, settings.selection) for count in like.counts().tolist()])
    matching = Matching(task, strategy, making, maker, clip, curation, wanted, of, steps)

    def complete() -> ImageSet:
        looked = matching.top_up(progress)
        told = {"strategy": settings.prompts.strategy, "fingerprint": strategy.fingerprint, **strategy.record()}
        config = of | _named(maker) | {"prompts": told, "rounds": matching.rounds, "unfilled": matching.unfilled}
        _seal(making, key, matching.shards, config, task, uses_real_captions=strategy.uses_real_captions)
        return finish(looked)

    return _shared_out(making, key, of, matching.shards, maker, share, progress, complete, finish)


def perturb(
    task: Task,
    init: ImageSet,
    generator: Generator | Maker,
    clip: Clip,
    out: Path,
    strength: float,
    settings: SynthesizeSettings,
    curation: CurateSettings,
    progress: Progress | None = None,
    first: int | None = None,
    *,
    prompt: str | None = None,
    share: Share | None = None,
) -> ImageSet:
    """The images of `init` perturbed by `strength` (the γ of 2406.05184, section 5.1) and curated anew.

    Every candidate of `init` that was fit to be used is perturbed, so that the same filter leaves as many; with `first`, only that
    many kept images of each class. An image's noise follows from its key, so it is the same at every strength. `prompt` as in
    `PerturbSettings`. There is one image for each of `init`: what is flagged at every try is left out, and nothing is made in
    its place. Errors and `share` as for `synthesize`.
    """
    _same_task(task, init)
    find_descriptor(curation)
    if not 0 <= strength <= 1:
        raise UsageError(f"strength {strength}: a number from 0 to 1")
    maker = _maker(generator)
    rows = init.manifest[init.manifest["reason"].isin(_STILL_IN) & ~init.manifest["class_name"].isin(init.excluded)]
    if first is not None:
        curation = curation.model_copy(update={"least_per_class": 0})  # a sample to look at, not a set to train on
        rows = rows[(rows["rank"] >= 0) & (rows["rank"] < first)]
    of = _of(task, init, maker, settings) | {"strength": strength, "first": first, "prompt": prompt}
    key = content_key(of)
    finish = partial(
        curate, out, task=task, clip=clip, settings=curation, excluded=init.excluded, progress=_curated(progress)
    )
    if _is_finished(out, key):
        return finish()
    making = Making(out, "perturbed", task.class_names, maker.name, settings, strength, init.folder)
    shards = cut(perturb_requests(task, rows, prompt), settings.shard_size, 0, of)

    def complete() -> ImageSet:
        fill(making, shards, maker, progress=progress)
        _seal(making, key, shards, of | _named(maker), task, uses_real_captions=prompt == OWN_CAPTION)
        return finish()

    return _shared_out(making, key, of, shards, maker, share, progress, complete, finish)


def _shared_out(
    making: Making,
    key: str,
    of: dict[str, Any],
    shards: Sequence[Shard],
    maker: Maker,
    share: Share | None,
    progress: Progress | None,
    complete: Callable[[], ImageSet],
    finish: Callable[[], ImageSet],
) -> ImageSet:
    """Hold the folder; make this rank's `shards`, if there are others; then `complete` the candidates, or `finish` what is."""
    out = making.out
    with claimed(out, content_key(of), key, share):
        if share and candidates_record(out, key, verify=False) is None:
            fill(making, shards, maker, share, progress)
            others_left(out, shards, share)
        with finishing(out) if share else nullcontext():
            return complete() if candidates_record(out, key, verify=False) is None else finish()


def _steps(
    task: Task,
    like: ImageSet,
    settings: SynthesizeSettings,
    curation: CurateSettings,
    known: KnownPool | None,
    out: Path,
    progress: Progress | None,
) -> list[Step]:
    """What is decided on synthetic images beside what is decided on all, in this order."""
    told = partial(progress, "looking for copies of the pool") if progress else None
    steps = (
        memorised_step(settings.memorised, known, like, curation, out, told),
        selection_step(settings.selection, task.name, like),
        no_more_step(like.counts()),
    )
    return [step for step in steps if step]


def _same_task(task: Task, given: ImageSet) -> None:
    if (given.task, given.class_names) != (task.name, task.class_names):
        raise UsageError(
            f"{given.folder}: an image set of task {given.task!r}, not of {task.name!r} with these classes"
        )


def _maker(generator: Generator | Maker) -> Maker:
    return generator if isinstance(generator, Maker) else Here(generator)


def _of(task: Task, given: ImageSet, maker: Maker, settings: SynthesizeSettings) -> dict[str, Any]:
    """What images follow from beside their requests."""
    told = settings.model_dump(mode="json", exclude={*_SPEED, "preset"})
    told["prompts"] = {name: value for name, value in told["prompts"].items() if name not in _NAMED_BY_CONTENT}
    return {
        "version": _VERSION,
        "task": task.fingerprint,
        "of": given.record["files"]["manifest.parquet"]["sha256"],
        "generator": maker.fingerprint,
        "synthesize": told,
    }


def _named(maker: Maker) -> dict[str, Any]:
    return {"generator": {"name": maker.name, "fingerprint": maker.fingerprint}}


def _curated(progress: Progress | None) -> Callable[[int, int], None] | None:
    return partial(progress, "images looked at") if progress else None


def _is_finished(out: Path, key: str) -> bool:
    return (out / SEAL).is_file() and candidates_record(out, key) is not None


def _seal(making: Making, key: str, shards: Sequence[Shard], config: dict[str, Any], task: Task, **told: Any) -> None:
    names = {"task": task.name, "source": making.source, "class_names": list(task.class_names)}
    config |= {"prompts_cut": count_cut(making.out, shards)}
    seal_shards(making.out, key, shards, config=config, **names, **told)
