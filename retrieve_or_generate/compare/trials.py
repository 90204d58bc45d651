"""Runs the trials of a run, one unit of work each, in workers that load a model and decode a task's images once.

Writes `trials/<name>/` (`finetune/trial.py` says what it holds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retrieve_or_generate.compare.plan import TrialPlan, chosen_rows
from retrieve_or_generate.compare.sets import set_folder
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.image_set import load_image_set
from retrieve_or_generate.store import read_seal

if TYPE_CHECKING:
    from retrieve_or_generate.finetune import LabelledImages, TaskImages
    from retrieve_or_generate.finetune.data import DecodedSet
    from retrieve_or_generate.models import ImageModel


@dataclass
class _Bench:
    """What trials share in one worker: the model, decoded tasks and decoded image sets."""

    out: Path
    experiment: Experiment
    clip: ImageModel
    tasks: dict[str, TaskImages] = field(default_factory=dict)
    sets: dict[tuple[str, str], DecodedSet] = field(default_factory=dict)

    def task(self, name: str) -> TaskImages:
        from retrieve_or_generate.finetune import task_images
        from retrieve_or_generate.tasks import load_task

        if name not in self.tasks:
            loaded = next(task for task in map(load_task, self.experiment.tasks) if task.name == name)
            self.tasks[name] = task_images(loaded, self.clip, self.experiment.finetune.preprocess)
        return self.tasks[name]

    def train(self, trial: TrialPlan) -> LabelledImages | None:
        """The images of the trial, cut out of its decoded set, or of two where it mixes them; None off the shelf."""
        from retrieve_or_generate.finetune.mixing import joined

        sets = {source: self.decoded(trial.task, source) for source in trial.parts}
        parts = [one.drawn(chosen_rows(one.image_set, trial, source)) for source, one in sets.items()]
        mix = self.experiment.mix(trial.source)
        return joined(*parts, gamma=mix.gamma if mix else None) if parts else None

    def decoded(self, task: str, source: str) -> DecodedSet:
        from retrieve_or_generate.finetune.data import decoded_set

        if (task, source) not in self.sets:
            folder, how = set_folder(self.out, task, source), self.experiment.finetune
            image_set = load_image_set(folder, task, verify=False)  # verified when the run was planned
            self.sets[task, source] = decoded_set(image_set, how.working_size or self.clip.image_size, how.preprocess)
        return self.sets[task, source]


def prepare(out: Path, experiment: Experiment, device: str) -> Callable[[TrialPlan], None]:
    """What a worker does once."""
    import torch

    from retrieve_or_generate.models import load_model

    torch.set_num_threads(1)
    return partial(_run, _Bench(out, experiment, load_model(experiment.finetuned_model, device)))


def _run(bench: _Bench, trial: TrialPlan) -> None:
    from retrieve_or_generate.finetune import finetune, write_trial
    from retrieve_or_generate.finetune.checkpoint import FOLDER, Checkpoint

    train, task = bench.train(trial), bench.task(trial.task)
    e, folder = bench.experiment, bench.out / "trials" / trial.name
    checkpoint = Checkpoint(folder / FOLDER, trial.key, e.finetune.checkpoint_every)
    seed = trial.seed_value
    outcome = finetune(bench.clip, train, task, e.finetune, e.linear_probe, seed=seed, checkpoint=checkpoint)
    write_trial(folder, trial.config, outcome)
    checkpoint.remove()


def is_done(out: Path, trial: TrialPlan) -> bool:
    """Whether the trial was finished and every file of it is as it was written."""
    return read_seal(out / "trials" / trial.name, "result.json", trial.key) is not None
