"""The image sets of a run, one unit of work each: `sets/<task>/<source>`, and `…/shown-<strength>` for the report alone.

Before them the pool is searched once for all tasks (`search/<task>/`). What a set cost stands in `stages/<task>-<source>.json`, its
share of the search in `stages/<task>-search.json`. Runs in worker processes, where models are loaded once.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.executors import Unit, tell
from retrieve_or_generate.experiment import Experiment, kind_of
from retrieve_or_generate.image_set import SEAL, ImageSet, load_image_set
from retrieve_or_generate.store import write_json

if TYPE_CHECKING:
    from retrieve_or_generate.models import Clip
    from retrieve_or_generate.pool.layout import Pool
    from retrieve_or_generate.synthesize import Generator, KnownPool
    from retrieve_or_generate.tasks import Task

_MADE_OF_RETRIEVED = ("synthetic", "perturbed")


@dataclass(frozen=True)
class SetRequest:
    """One image set to make."""

    task: str
    source: str


def set_folder(out: Path, task: str, source: str) -> Path:
    """Where the set that `source` is trained on lies."""
    return out / "sets" / task / source


def open_sets(out: Path, tasks: dict[str, Task], experiment: Experiment) -> dict[tuple[str, str], ImageSet]:
    """All finished sets that trials draw from, by (task, source). Their files were verified when they were made."""
    sources = experiment.set_sources
    return {(task, source): load_image_set(set_folder(out, task, source), task) for task in tasks for source in sources}


def retrieved_sets(out: Path, tasks: dict[str, Task]) -> dict[str, ImageSet]:
    """The retrieved set of each task."""
    return {task: load_image_set(set_folder(out, task, "retrieved"), task, verify=False) for task in tasks}


def missing(out: Path, tasks: dict[str, Task], experiment: Experiment) -> list[tuple[str, list[Unit[SetRequest]]]]:
    """Sets that are not there yet, in waves of what can be made at once: retrieved ones, then what is made of them."""
    if set(experiment.sources) <= {"none"}:
        return []
    made = tuple(source for source in experiment.sources if kind_of(source) in _MADE_OF_RETRIEVED)
    waves = {"retrieval": ("retrieved",), "synthesis": made}
    return [(what, units) for what, sources in waves.items() if (units := _units(out, tasks, experiment, sources))]


def _units(
    out: Path, tasks: dict[str, Task], experiment: Experiment, sources: tuple[str, ...]
) -> list[Unit[SetRequest]]:
    return [
        Unit(f"{task} {source}", SetRequest(name, source), cost=2.0 if kind_of(source) == "synthetic" else 1.0)
        for task, name in zip(tasks, experiment.tasks, strict=True)
        for source in sources
        if not (_cost_record(out, task, source).exists() and (set_folder(out, task, source) / SEAL).exists())
    ]


def search_units(out: Path, tasks: dict[str, Task], experiment: Experiment) -> list[Unit[tuple[str, ...]]]:
    """The search for all tasks at once, unless every retrieved set is there already."""
    if set(experiment.sources) <= {"none"} or not _units(out, tasks, experiment, ("retrieved",)):
        return []
    return [Unit("the search of the pool", experiment.tasks)]


def prepare_search(
    out: Path, experiment: Experiment, device: str, threads: int, index_folder: Path | None
) -> Callable[[tuple[str, ...]], None]:
    """The search is one unit, so it takes the threads that the workers of other units would."""
    import torch

    torch.set_num_threads(threads)
    return partial(_search, out, experiment, device, index_folder)


def _search(out: Path, experiment: Experiment, device: str, index_folder: Path | None, names: tuple[str, ...]) -> None:
    """Search for every task, then record what that cost, shared out by the tasks' classes."""
    from retrieve_or_generate.models import load_clip
    from retrieve_or_generate.retrieve.search import open_search, run_search
    from retrieve_or_generate.tasks import load_task

    settings = experiment.retrieve
    started = time.perf_counter()
    tasks = [load_task(name) for name in names]
    clip = load_clip(settings.model or experiment.model, device)
    search = open_search(_pool(experiment), clip, settings, tasks, index_folder=index_folder)
    run_search(search, {_search_folder(out, task): task for task in tasks}, out / "search", tell)
    seconds, classes = time.perf_counter() - started, sum(len(task.class_names) for task in tasks)
    for task in tasks:
        share = seconds * len(task.class_names) / classes
        write_json(_cost_record(out, task.name, "search"), _cost("search", task, "retrieved", share, 0, device))


def _pool(experiment: Experiment) -> Pool | None:
    """The pool that is searched here; None where a service searches its own."""
    from retrieve_or_generate.pool.layout import open_pool

    return None if experiment.retrieve.engine == "remote" else open_pool(experiment.pool)


def known_pool(experiment: Experiment, like: ImageSet) -> KnownPool | None:
    """The pool that `like` was retrieved from, for copies of it to be found; None where the experiment has another, or a service.

    Raises `UsageError` where it is not there, saying how to go without it.
    """
    from retrieve_or_generate.pool.layout import open_pool
    from retrieve_or_generate.synthesize import KnownPool

    of = like.record["config"].get("pool") or {}
    is_another = experiment.pool == "pocket" != of.get("name")  # which is built when it is asked for
    if experiment.synthesize.memorised == "off" or of.get("fingerprint") is None or is_another:
        return None
    try:
        pool = open_pool(experiment.pool)
    except UsageError as error:
        raise UsageError(
            f"{error}. Generating without a look for copies of the pool goes with --set synthesize.memorised=off"
        ) from error
    return (
        KnownPool(pool, experiment.retrieve.model or experiment.model)
        if pool.fingerprint == of["fingerprint"]
        else None
    )


def _search_folder(out: Path, task: Task) -> Path:
    return out / "search" / task.name


def _cost_record(out: Path, task: str, source: str) -> Path:
    return out / "stages" / f"{task}-{source}.json"


def prepare(
    out: Path, experiment: Experiment, device: str, index_folder: Path | None = None
) -> Callable[[SetRequest], None]:
    """What a worker does once: load CLIP. The generator is loaded when the first set needs it."""
    import torch

    from retrieve_or_generate.models import load_clip

    torch.set_num_threads(1)
    return partial(_make, _Maker(out, experiment, device, index_folder, load_clip(experiment.model, device)))


@dataclass
class _Maker:
    out: Path
    experiment: Experiment
    device: str
    index_folder: Path | None
    clip: Clip
    loaded: tuple[str, Generator] | None = None

    def generator(self, variant: Experiment) -> Generator:
        """The one of this variant; the last one asked for is kept."""
        from retrieve_or_generate.synthesize import load_generator

        how = variant.synthesize
        if self.loaded is None or self.loaded[0] != variant.generator or not self.loaded[1].serves(how):
            self.loaded = None  # its memory is free before the other is loaded
            self.loaded = variant.generator, load_generator(variant.generator, self.device, how)
        return self.loaded[1]


def _make(maker: _Maker, request: SetRequest) -> None:
    """Make one set, then record its cost."""
    from retrieve_or_generate.tasks import load_task

    task = load_task(request.task)
    folder = set_folder(maker.out, task.name, request.source)
    stage, make = _STAGES[kind_of(request.source)]
    started = time.perf_counter()
    image_set = make(maker, maker.experiment.variant(request.source), task, folder)
    seconds = time.perf_counter() - started
    cost = _cost(stage, task, request.source, seconds, len(image_set.manifest), maker.device)
    write_json(_cost_record(maker.out, task.name, request.source), cost)


def _cost(
    stage: str, task: Task, source: str, seconds: float, images: int, device: str
) -> dict[str, str | int | float]:
    return {
        "stage": stage,
        "task": task.name,
        "source": source,
        "wall_seconds": round(seconds, 3),
        "images": images,
        "device": device,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def _retrieved(maker: _Maker, e: Experiment, task: Task, folder: Path) -> ImageSet:
    from retrieve_or_generate.retrieve import retrieve

    clip, index, found = maker.clip, maker.index_folder, _search_folder(maker.out, task)
    return retrieve(task, _pool(e), clip, folder, e.retrieve, e.curate, index_folder=index, search_folder=found)


def _synthetic(maker: _Maker, e: Experiment, task: Task, folder: Path) -> ImageSet:
    from retrieve_or_generate.synthesize import synthesize

    like = load_image_set(set_folder(maker.out, task.name, "retrieved"), task.name)
    generator, known = maker.generator(e), known_pool(e, like)
    return synthesize(task, like, generator, maker.clip, folder, e.synthesize, e.curate, known=known)


def _perturbed(maker: _Maker, e: Experiment, task: Task, folder: Path) -> ImageSet:
    """The set that is trained on and, beside the one that is called no more than `perturbed`, those that are only shown."""
    from retrieve_or_generate.synthesize import perturb

    init = load_image_set(set_folder(maker.out, task.name, "retrieved"), task.name)

    def at(strength: float, where: Path, first: int | None = None) -> ImageSet:
        generator, clip, how, curation = maker.generator(e), maker.clip, e.synthesize, e.curate
        return perturb(
            task, init, generator, clip, where, strength, how, curation, first=first, prompt=e.perturb.prompt
        )

    for strength in e.perturb.shown if folder.name == "perturbed" else ():
        at(strength, folder.with_name(f"shown-{strength:g}"), first=1)
    return at(e.perturb.strength, folder)


_STAGES: dict[str, tuple[str, Callable[[_Maker, Experiment, Task, Path], ImageSet]]] = {
    "retrieved": ("retrieve", _retrieved),
    "synthetic": ("synthesize", _synthetic),
    "perturbed": ("perturb", _perturbed),
}
