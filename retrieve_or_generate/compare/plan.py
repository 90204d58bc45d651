"""The grid of a run: which trials there are, and what names each of them. Loads no model.

A trial's key follows from the contents of its inputs and from its parameters; its folder carries the key, so a trial that was made
from other inputs is never taken for it. Trials of different sources at the same seed are paired: same order rules, same data order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieve_or_generate.compare.drawn import Drawn, manifest_of
from retrieve_or_generate.curate.balance import class_quotas
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import MixSettings
from retrieve_or_generate.store import content_key
from retrieve_or_generate.tasks import Task

_VERSION = 2  # part of every key: raise when the same inputs give another result


@dataclass(frozen=True)
class TrialPlan:
    """One cell of the grid. `config` says all that its result follows from; `quotas` are images of each class."""

    task: str
    source: str
    scale: int
    seed: int
    config: dict[str, Any]

    @property
    def quotas(self) -> tuple[int, ...]:
        return tuple(self.config["quotas"])

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The sources whose sets the trial draws from, and how many images of each class: itself, or the two of a mixture."""
        drawn = self.config.get("parts", {self.source: self.config["quotas"]} if self.source != "none" else {})
        return {source: tuple(quotas) for source, quotas in drawn.items()}

    @property
    def seed_value(self) -> int:
        """Derived from names: the same for every source and scale of a task."""
        return int(self.config["seed_value"])

    @property
    def key(self) -> str:
        return content_key(self.config)

    @property
    def name(self) -> str:
        return f"{self.task}-{self.source}-n{self.scale}-s{self.seed}-{self.key[:8]}"


def plan_trials(
    experiment: Experiment, tasks: Mapping[str, Task], sets: Mapping[tuple[str, str], ImageSet], fingerprint: str
) -> list[TrialPlan]:
    """All trials of the grid; off the shelf is one trial a task. `UsageError` names a class that is too small.

    `fingerprint` is that of the model that is fine-tuned.

    A class that one source leaves out is left out of all, by name in the trials' configuration; labels stay the task's.
    """
    trials = []
    for name, task in tasks.items():
        shared = _shared(experiment, task, fingerprint)
        if "none" in experiment.sources:
            trials.append(_trial(shared | {"quotas": []}, "none", 0, 0))
        drawn = Drawn(task, {source: sets[name, source] for source in experiment.set_sources})
        for scale in experiment.scales if drawn.sets else ():
            quotas = drawn.quotas(scale)
            for source in experiment.sources:
                if source != "none":
                    mix = experiment.mix(source)
                    made_of = shared | (drawn.mixed(mix, quotas) if mix else drawn.alone(source, quotas))
                    trials += [_trial(made_of, source, scale, seed) for seed in range(experiment.seeds)]
    return trials


def plan_trial(
    experiment: Experiment,
    task: Task,
    sets: Sequence[ImageSet],
    fingerprint: str,
    scale: int | None = None,
    seed: int = 0,
    gamma: float | None = None,
) -> TrialPlan:
    """One trial as a grid would hold it: off the shelf, of an image set, or of two that are mixed.

    All images of the sets, or `scale` in all, of which two give half each. `gamma` weighs the losses of the two.

    Raises:
        UsageError: a scale that a class cannot fill, more than two sets or one twice, or `gamma` without two or out of (0, 1).
    """
    if len(sets) > 2 or len({manifest_of(one) for one in sets}) < len(sets):
        raise UsageError("give one image set to train on, or two different ones to mix")
    if gamma is not None and (len(sets) < 2 or not 0 < gamma < 1):
        raise UsageError(f"gamma {gamma:g}: it weighs the losses of two image sets and lies between 0 and 1")
    shared = _shared(experiment, task, fingerprint)
    if not sets:
        if scale is not None:
            raise UsageError(f"scale {scale}: images of a set; give one to train on (--train SET), or no --scale")
        return _trial(shared | {"quotas": []}, "none", 0, 0)
    drawn = Drawn(task, _by_source(sets))
    sizes = [int(count.sum()) for count in drawn.counts.values()]
    images = scale or sum(sizes)
    if len(sets) == 1:
        return _trial(shared | drawn.alone(sets[0].source, drawn.quotas(images)), sets[0].source, images, seed)
    first, second = drawn.sets
    mix = MixSettings(of=(first, second), counts=None if scale else (sizes[0], sizes[1]), gamma=gamma)
    return _trial(shared | drawn.mixed(mix, drawn.quotas(scale or 0)), "mixed", images, seed)


def _by_source(sets: Sequence[ImageSet]) -> dict[str, ImageSet]:
    """By name; two of one source are told apart by their place."""
    if len({one.source for one in sets}) == len(sets):
        return {one.source: one for one in sets}
    return {f"{one.source}-{place}": one for place, one in enumerate(sets, start=1)}


def _shared(experiment: Experiment, task: Task, fingerprint: str) -> dict[str, Any]:
    """What every trial of a task follows from."""
    how = experiment.finetune.model_dump(mode="json", exclude={"checkpoint_every", "compile", "model"})
    return {
        "version": _VERSION,
        "task": {"name": task.name, "fingerprint": task.fingerprint, "shifts": task.shift_fingerprints},
        "model": {"name": experiment.finetuned_model, "fingerprint": fingerprint},
        "finetune": how,
        "linear_probe": experiment.linear_probe.model_dump(mode="json"),
    }


def check_scales(experiment: Experiment, tasks: Mapping[str, Task], retrieved: Mapping[str, ImageSet]) -> None:
    """`UsageError` if a scale is larger than a retrieved set: what is generated to match it cannot be larger either."""
    mixes = [mix for source in experiment.sources if (mix := experiment.mix(source))]
    asked = [*experiment.scales, *(count for mix in mixes for count in mix.counts or () if count)]
    for name, image_set in retrieved.items():
        class_quotas({"retrieved": image_set.counts()}, max(asked), tasks[name].class_names, image_set.excluded)


def _trial(made_of: dict[str, Any], source: str, scale: int, seed: int) -> TrialPlan:
    task = made_of["task"]["name"]
    cell = {"source": source, "scale": scale, "seed": seed, "seed_value": seed_for("compare", "trial", task, seed)}
    return TrialPlan(task, source, scale, seed, made_of | cell)


def chosen_rows(image_set: ImageSet, trial: TrialPlan, source: str | None = None) -> list[str]:
    """Keys of the images of the set that a trial is trained on; of a mixture, of `source`'s set.

    Within a seed, a smaller scale is a subset of a larger one.
    """
    quotas = trial.parts[source or trial.source]
    return list(image_set.rows_at(np.array(quotas), order_seed=trial.seed_value)["key"])
