"""One trial: train along the recipe, look at validation now and then, test what validation chose.

The learning rate and the moment of training are chosen on validation alone, once for zero-shot and once for the linear probe;
every look and both choices go to the history. Test images are shown to what was chosen and to nothing else.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune import recipe
from retrieve_or_generate.finetune.checkpoint import Checkpoint
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.contrastive import Paired
from retrieve_or_generate.finetune.data import LabelledImages, TaskImages
from retrieve_or_generate.finetune.distributed import ALONE, World
from retrieve_or_generate.finetune.learner import Learner
from retrieve_or_generate.finetune.looks import Best, Judge, Look, copied
from retrieve_or_generate.finetune.trial import TrialOutcome
from retrieve_or_generate.models import ImageModel
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings


def finetune(
    clip: ImageModel,
    train: LabelledImages | None,
    task: TaskImages,
    settings: FinetuneSettings | None = None,
    probe: ProbeSettings | None = None,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    world: World = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> TrialOutcome:
    """Train a copy of `clip` on `train` and measure it on test images and shifts of `task`; without `train`, measure it as it is.

    `seed` gives data order and augmentation. Equal seeds give equal bits on one thread of one machine. `clip` is left as it was.
    With a `checkpoint` training goes on from what it holds, and a SIGTERM saves it there and ends the process with 143. The
    processes of a `world` are given the same, and have the same outcome. `progress` hears how many updates are made,
    and of how many.

    Raises:
        UsageError: images of another size, labels out of range, or training that diverged at every learning rate.
    """
    settings = settings or FinetuneSettings()
    n_train = len(train) if train is not None else 0
    if train is not None and world.size > settings.batch_size:
        raise UsageError(f"{world.size} processes for batches of {settings.batch_size} images: start fewer")
    _check_all(train, task, settings.working_size or clip.image_size, clip.image_size)
    work = _Work(clip, task, settings, probe or ProbeSettings(), seed, checkpoint, world, progress)
    zero_shot, probed = work.choose(train)
    own, *shifted = work.judge.test(zero_shot, probed)
    return TrialOutcome(
        test=task.test,
        zero_shot_logits=own.zero_shot_logits,
        linear_probe_probabilities=own.linear_probe_probabilities,
        shifts=dict(zip(task.shifts, shifted, strict=True)),
        history=tuple(work.history),
        n_train=n_train,
        updates=recipe.plan(settings, n_train).updates,
        images_seen=work.images_seen,
        stall_seconds=work.stall_seconds,
        wall_seconds=work.wall_seconds,
        device=clip.device.type,
        precision=str(work.classifier.precision).removeprefix("torch."),
        processes=world.size,
        model=zero_shot.state,
    )


def _check_all(train: LabelledImages | None, task: TaskImages, working_size: int, size: int) -> None:
    if train is not None:
        _check(train, "training", working_size, task.n_classes)
    parts = {"task's train": task.train, "val": task.val, "test": task.test, **task.shifts}
    for what, images in parts.items():
        _check(images, what, size, task.n_classes)


def _check(images: LabelledImages, what: str, size: int, n_classes: int) -> None:
    if not len(images):
        raise UsageError(f"no {what} images")
    if images.images.shape[1:] != (3, size, size):
        raise UsageError(f"{what} images are {images.images.shape[1:]}, but the model takes {(3, size, size)}")
    low, high = images.labels.min(), images.labels.max()
    if low < 0 or high >= n_classes:
        raise UsageError(f"{what} labels go from {low} to {high}, but there are {n_classes} classes")


@dataclass
class _Work:
    """One trial under way: a classifier, who judges it, a history that grows, and where that is kept."""

    clip: ImageModel
    task: TaskImages
    settings: FinetuneSettings
    probe: ProbeSettings
    seed: int
    checkpoint: Checkpoint | None = None
    world: World = ALONE
    progress: Callable[[int, int], None] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    images_seen: int = 0
    stall_seconds: float = 0.0
    images_per_pass: int | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        weights = self.task.class_weights.to(self.clip.device)
        if self.settings.loss == "contrastive":
            said = self.task.class_names, self.task.templates
            self.classifier: Classifier = Paired(self.clip, weights, *said, self.settings.precision)
        else:
            self.classifier = Classifier(self.clip, weights, self.settings.precision)
        self.world.copy_first(self.classifier.state_dict().values())
        if self.settings.compile:
            if self.clip.device.type == "cpu":
                raise UsageError(
                    "finetune.compile is for a GPU (--device cuda): on a CPU it takes longer than it saves"
                )
            self.classifier.compile_tower()
        self.judge = Judge(self.classifier, self.task, self.probe, self.seed, self.world)

    @property
    def wall_seconds(self) -> float:
        return time.perf_counter() - self.started

    def choose(self, train: LabelledImages | None) -> tuple[Look, Look]:
        """Train, and give what validation prefers for zero-shot and for the probe."""
        plan = recipe.plan(self.settings, len(train) if train else 0)
        if train is None or not plan.updates:
            self._look(0.0, 0, 1.0, None)
        else:
            with self.checkpoint.heeding_sigterm() if self.checkpoint else nullcontext():
                self._train(train, plan)
        zero_shot, probed = self.best.zero_shot, self.best.probed
        if zero_shot is None or probed is None:
            rates = ", ".join(f"{rate:g}" for rate in self.settings.learning_rates)
            raise UsageError(f"training diverged at every learning rate ({rates}); set smaller finetune.learning_rates")
        for name, look in (("zero_shot", zero_shot), ("linear_probe", probed)):
            at = {"learning_rate": look.learning_rate, "update": look.update, "wise_ft": look.wise_ft}
            self.history.append({"chosen_for": name} | at)
        return zero_shot, probed

    def _train(self, train: LabelledImages, plan: recipe.Plan) -> None:
        """From the start, or from what was saved, at one peak rate after another."""
        saved = self.checkpoint.load() if self.checkpoint else None
        start = copied(self.classifier.state_dict())
        first = saved["rate"] if saved else 0
        for index, rate in enumerate(self.settings.learning_rates[first:], start=first):
            self.classifier.load_state_dict(start)
            learner = Learner(
                self.classifier, train, self.settings, plan, rate, self.seed, self.images_per_pass, self.world
            )
            looked = self._resume(saved, learner) if saved else 0
            saved = None
            self._descend(learner, plan, index, looked, start)
            self.stall_seconds += learner.feed.waited
            del learner  # its images make room for those of the next

    def _descend(self, learner: Learner, plan: recipe.Plan, index: int, looked: int, start: dict[str, Tensor]) -> None:
        """To the end of the plan, with the looks after `looked`; it ends early where the loss is no longer a number."""
        rate = self.settings.learning_rates[index]
        while True:
            if self.checkpoint:
                self.checkpoint.pause((index, learner.update), lambda: self._state(index, learner, looked))  # noqa: B023
            if learner.update in plan.looks and looked < learner.update:
                loss, looked = learner.mean_loss(), learner.update
                if not math.isfinite(loss):
                    self.history.append({"learning_rate": rate, "update": learner.update, "diverged": True})
                    return
                self._looks(rate, learner.update, loss, start)
            elif learner.update < plan.updates:
                self.images_seen += learner.step()
                self._note_passes(learner)
                if self.progress:
                    rates = len(self.settings.learning_rates)
                    self.progress(index * plan.updates + learner.update, rates * plan.updates)
            else:
                return

    def _note_passes(self, learner: Learner) -> None:
        """Say once that memory was too small for a whole batch, and go on so at the next rate."""
        if learner.images_per_pass < (self.images_per_pass or self.settings.batch_size):
            self.images_per_pass = learner.images_per_pass
            self.history.append({"update": learner.update, "images_per_pass": learner.images_per_pass})
            if self.world.first:
                print(
                    f"rog: memory is too small for a batch of {self.settings.batch_size}; it goes through in passes of "
                    f"{learner.images_per_pass}, which changes speed alone",
                    file=sys.stderr,
                )

    def _looks(self, rate: float, update: int, train_loss: float, start: dict[str, Tensor]) -> None:
        """Measure the classifier as it is, or each of its mixtures with what it was at `start`; it is left as it is."""
        if self.settings.wise_ft == (1.0,):
            self._look(rate, update, 1.0, train_loss)
            return
        tuned = copied(self.classifier.state_dict())
        for alpha in self.settings.wise_ft:
            self.classifier.load_state_dict(interpolated(start, tuned, alpha))
            self._look(rate, update, alpha, train_loss)
        self.classifier.load_state_dict(tuned)

    def _look(self, rate: float, update: int, alpha: float, train_loss: float | None) -> None:
        """Look at the classifier as it is, and keep it where it is the best so far."""
        look = self.judge.look(rate, update, alpha)
        if look is None and train_loss is None:
            raise UsageError(f"{self.clip.name}: what it makes of the task's images are no numbers; take another model")
        if look is None:
            self.history.append({"learning_rate": rate, "update": update, "wise_ft": alpha, "diverged": True})
            return
        self.history.append(look.row() | {"train_loss": train_loss})
        self.best.offer(look)

    def _state(self, index: int, learner: Learner, looked: int) -> dict[str, Any]:
        looks = [look.packed() if look else None for look in (self.best.zero_shot, self.best.probed)]
        return {
            "rate": index,
            "looked": looked,
            "learner": learner.state(),
            "history": json.dumps(self.history),
            "images_seen": self.images_seen,
            "images_per_pass": self.images_per_pass,
            "wall_seconds": self.wall_seconds,
            "stall_seconds": self.stall_seconds + learner.feed.waited,
            "looks": looks[:1] if self.best.zero_shot is self.best.probed else looks,
        }

    def _resume(self, saved: dict[str, Any], learner: Learner) -> int:
        """Be where `saved` was; the update of the last look at this rate."""
        learner.resume(saved["learner"])
        self.history, self.images_seen = json.loads(saved["history"]), saved["images_seen"]
        self.images_per_pass, self.stall_seconds = saved["images_per_pass"], saved["stall_seconds"]
        self.started -= saved["wall_seconds"]  # of the processes before this one
        learner.images_per_pass = self.images_per_pass or learner.images_per_pass
        looks = [self.judge.unpacked(packed) if packed else None for packed in saved["looks"]]
        self.best = Best(looks[0], looks[-1])
        return int(saved["looked"])


def interpolated(start: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 − α) `start` + α `tuned`, weight by weight (WiSE-FT, arXiv 2109.01903); what is no real number stays as it was tuned."""
    return {
        name: torch.lerp(start[name], value, alpha) if value.is_floating_point() else value
        for name, value in tuned.items()
    }
