"""The grid of a run: which trials there are, and what names each of them. Loads no model.

A trial's key follows from the contents of its inputs and from its parameters; its folder carries the key, so a trial that was made
from other inputs is never taken for it. Trials of different sources at the same seed are paired: same order rules, same data order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieve_or_generate.curate.balance import class_quotas
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.store import content_key
from retrieve_or_generate.tasks import Task

_VERSION = 1  # part of every key: raise when the same inputs give another result


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
        shared = {
            "version": _VERSION,
            "task": {"name": name, "fingerprint": task.fingerprint} | _shifts(task),
            "model": {"name": experiment.finetuned_model, "fingerprint": fingerprint},
            "finetune": experiment.finetune.model_dump(mode="json", exclude={"checkpoint_every", "model"}),
            "linear_probe": experiment.linear_probe.model_dump(mode="json"),
        }
        if "none" in experiment.sources:
            trials.append(_trial(shared, name, "none", 0, 0, ()))
        drawn = {source: sets[name, source] for source in experiment.sources if source != "none"}
        counts = {str(source): image_set.counts() for source, image_set in drawn.items()}
        excluded = {class_name for image_set in drawn.values() for class_name in image_set.excluded}
        if excluded:
            shared |= {"excluded": sorted(excluded, key=task.class_names.index)}
        for scale in experiment.scales if drawn else ():
            quotas = tuple(int(n) for n in class_quotas(counts, scale, task.class_names, excluded))
            for source, image_set in drawn.items():
                made_of = shared | {"image_set": image_set.record["files"]["manifest.parquet"]["sha256"]}
                trials += [_trial(made_of, name, source, scale, seed, quotas) for seed in range(experiment.seeds)]
    return trials


def _shifts(task: Task) -> dict[str, Any]:
    """What a trial measures besides; the key of a task without shifts is what it was before there were any."""
    return {"shifts": task.shift_fingerprints} if task.shifts else {}


def check_scales(experiment: Experiment, tasks: Mapping[str, Task], retrieved: Mapping[str, ImageSet]) -> None:
    """`UsageError` if a scale is larger than a retrieved set: what is generated to match it cannot be larger either."""
    for name, image_set in retrieved.items():
        counts = {"retrieved": image_set.counts()}
        class_quotas(counts, max(experiment.scales), tasks[name].class_names, image_set.excluded)


def _trial(shared: dict[str, Any], task: str, source: str, scale: int, seed: int, quotas: tuple[int, ...]) -> TrialPlan:
    cell = {"source": source, "scale": scale, "seed": seed, "quotas": list(quotas)}
    return TrialPlan(
        task, source, scale, seed, shared | cell | {"seed_value": seed_for("compare", "trial", task, seed)}
    )


def chosen_rows(image_set: ImageSet, trial: TrialPlan) -> list[str]:
    """Keys of the images a trial is trained on. Within a seed, a smaller scale is a subset of a larger one."""
    return list(image_set.rows_at(np.array(trial.quotas), order_seed=trial.seed_value)["key"])
