"""A trial by itself, on image sets that somebody names: planned, trained and written as a run's, alone or on several processes.

Reads image sets and a task, writes a trial folder (`finetune/trial.py` says what it holds). Only one call at a time writes to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retrieve_or_generate.compare.plan import TrialPlan, chosen_rows, plan_trial
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.executors import tell
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.finetune import LabelledImages, Trial, TrialOutcome, finetune, read_trial, task_images
from retrieve_or_generate.finetune.checkpoint import FOLDER, Checkpoint, is_only_checkpoint
from retrieve_or_generate.finetune.data import decoded_set
from retrieve_or_generate.finetune.distributed import World
from retrieve_or_generate.finetune.mixing import joined
from retrieve_or_generate.finetune.processes import assembled
from retrieve_or_generate.finetune.saved import save_model
from retrieve_or_generate.finetune.trial import MODEL, begin_trial, is_begun, write_trial
from retrieve_or_generate.image_set import ImageSet, load_image_set
from retrieve_or_generate.models import load_model
from retrieve_or_generate.store import locked
from retrieve_or_generate.tasks import Task, load_task
from retrieve_or_generate.weights import clip_fingerprint

if TYPE_CHECKING:
    from retrieve_or_generate.models import ImageModel


@dataclass(frozen=True)
class SingleTrial:
    """What is asked for: `scale` images of the image sets `train` (None: all), none of them for a model off the shelf."""

    out: Path
    train: tuple[Path, ...]
    task: str | None
    scale: int | None
    seed: int
    experiment: Experiment
    gamma: float | None
    save_model: bool

    def run(self, device: str) -> Trial:
        """Read it where it is finished, else make it. In each of several processes that were started together, the same.

        Raises:
            UsageError: neither image sets nor a task, a scale that a class cannot fill, or `out` holds something else or is in use.
        """
        with assembled(device) as (world, own_device), ExitStack() as held:
            sets = self._sets()
            task = load_task(self._task_name(sets))
            fingerprint = clip_fingerprint(self.experiment.finetuned_model)
            plan = plan_trial(self.experiment, task, sets, fingerprint, self.scale, self.seed, self.gamma)
            checkpoint = Checkpoint(self.out / FOLDER, plan.key, self.experiment.finetune.checkpoint_every, world)
            if not (done := self._finished(plan)):
                world.from_first(lambda: held.enter_context(_taken(self.out, plan, checkpoint)))
                done = self._finished(plan)  # by whoever held the folder until now
            if done:
                checkpoint.remove()
                return done
            return self._made(plan, sets, task, checkpoint, own_device, world)

    def _sets(self) -> list[ImageSet]:
        """The second of the same task as the first."""
        sets = [load_image_set(folder) for folder in self.train[:1]]
        return sets + [load_image_set(folder, sets[0].task) for folder in self.train[1:]]

    def _task_name(self, sets: Sequence[ImageSet]) -> str:
        if name := self.task or (sets[0].task if sets else None):
            return name
        raise UsageError("give the image set to train on (--train SET), or a task to measure the model on (--task T)")

    def _finished(self, plan: TrialPlan) -> Trial | None:
        done = read_trial(self.out, plan.config)
        if done and self.save_model and done.model is None:
            raise UsageError(f"{self.out}: this trial is finished, and its model was not kept; choose another --out")
        return done

    def _made(
        self, plan: TrialPlan, sets: Sequence[ImageSet], task: Task, checkpoint: Checkpoint, device: str, world: World
    ) -> Trial:
        """All processes read and train, the first writes."""
        clip = load_model(self.experiment.finetuned_model, device)
        how, probe = self.experiment.finetune, self.experiment.linear_probe
        train, shown = self._drawn(plan, sets, clip), task_images(task, clip, how.preprocess)
        told = partial(tell, "updates") if world.first else None
        outcome = finetune(
            clip, train, shown, how, probe, seed=plan.seed_value, checkpoint=checkpoint, world=world, progress=told
        )
        trial = world.from_first(lambda: self._written(plan, outcome, clip, task))
        checkpoint.remove()
        return trial

    def _drawn(self, plan: TrialPlan, sets: Sequence[ImageSet], clip: ImageModel) -> LabelledImages | None:
        how = self.experiment.finetune
        size, parts = how.working_size or clip.image_size, []
        for image_set, source in zip(sets, plan.parts, strict=True):
            keys = chosen_rows(image_set, plan, source)
            parts.append(decoded_set(image_set, size, how.preprocess, keys).drawn(keys))
        return joined(*parts, gamma=self.gamma) if parts else None

    def _written(self, plan: TrialPlan, outcome: TrialOutcome, clip: ImageModel, task: Task) -> Trial:
        begin_trial(self.out, plan.config)
        model = []
        if self.save_model:
            model = save_model(self.out / MODEL, clip, outcome.model, task.class_names, task.templates)
        return write_trial(self.out, plan.config, outcome, model=model)


@contextmanager
def _taken(out: Path, plan: TrialPlan, checkpoint: Checkpoint) -> Iterator[None]:
    """Hold `out` against other calls; `UsageError` where it holds something else than the beginnings of this trial."""
    if out.is_dir() and not is_begun(out, plan.config) and not is_only_checkpoint(out, checkpoint):
        raise UsageError(f"{out}: not empty, and not this trial; remove it or choose another --out")
    with locked(out):
        yield
