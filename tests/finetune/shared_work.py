"""What two processes are told to do together in the tests: updates of a small classifier, features of it, whole trials."""

from __future__ import annotations

import copy
import errno
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import coloured, make_clip

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, TrialOutcome, finetune, recipe
from retrieve_or_generate.finetune.checkpoint import Checkpoint
from retrieve_or_generate.finetune.classifier import Classifier, features_of
from retrieve_or_generate.finetune.contrastive import Paired
from retrieve_or_generate.finetune.distributed import World
from retrieve_or_generate.finetune.learner import Learner
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

SMALL: dict[str, object] = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
NAMES, TEMPLATES = ("red", "green", "blue"), ("a {}", "some {} thing")
PROBE = ProbeSettings(inverse_regularisation=(1.0,))
KEY = "0123456789abcdef"
CLIP = make_clip(vision=SMALL)
TRAIN = coloured(11, seed=4)
TASK = TaskImages(
    CLIP.class_weights(NAMES, TEMPLATES),
    *(coloured(9, seed=seed) for seed in (1, 2, 3)),
    class_names=NAMES,
    templates=TEMPLATES,
)


@dataclass(frozen=True)
class Updates:
    """The loss before each update, the gradient of the first, the weights after the last, and the passes that memory allowed."""

    losses: list[float]
    gradient: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    images_per_pass: int


def classifier_of(settings: FinetuneSettings) -> Classifier:
    if settings.loss == "contrastive":
        return Paired(CLIP, TASK.class_weights, NAMES, TEMPLATES)
    return Classifier(CLIP, TASK.class_weights)


def updates(
    world: World, settings: FinetuneSettings, count: int, most: tuple[int, ...] = (), train: LabelledImages = TRAIN
) -> Updates:
    """So many updates; process i has memory for `most[i]` images at once, where that is said."""
    classifier = classifier_of(settings)
    learner = Learner(classifier, train, settings, recipe.plan(settings, len(train)), 1e-3, 1, world=world)
    losses, gradient = [], {}
    with fits_only(most[world.rank]) if most else pytest.MonkeyPatch.context():
        for update in range(count):
            learner.step()
            losses.append(learner.mean_loss())
            if not update:
                gradient = {name: p.grad.numpy() for name, p in classifier.named_parameters() if p.grad is not None}
    weights = {name: value.numpy() for name, value in classifier.state_dict().items()}
    return Updates(losses, gradient, weights, learner.images_per_pass)


@contextmanager
def fits_only(most: int) -> Iterator[None]:
    """Memory for the gradient of so many images at once."""
    features = Classifier.features

    def limited(self: Classifier, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features(self, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "features", limited)
        yield


def features(world: World, images: int, batch_size: int) -> np.ndarray:
    some = coloured(images, seed=5).images
    return features_of(Classifier(CLIP, TASK.class_weights), some, batch_size, world).numpy()


def trial(
    world: World, settings: FinetuneSettings, folder: Path | None = None, stops: tuple[int, int] = (0, 0)
) -> TrialOutcome:
    """A whole trial. `stops`: the process of this rank is terminated during its so many-th update from here."""
    checkpoint = Checkpoint(folder, KEY, world=world) if folder else None
    step, made = recipe.Descent.step, 0

    def terminated(descent: recipe.Descent, losses: Iterable[torch.Tensor]) -> None:
        nonlocal made
        made += 1
        if (world.rank, made) == stops:
            os.kill(os.getpid(), signal.SIGTERM)
        step(descent, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.Descent, "step", terminated)
        outcome = finetune(CLIP, TRAIN, TASK, settings, PROBE, seed=1, checkpoint=checkpoint, world=world)
    return replace(outcome, model={name: value.numpy() for name, value in outcome.model.items()})


def trial_of_other_weights(world: World, settings: FinetuneSettings) -> TrialOutcome:
    """A trial that finds another model on each process."""
    other = copy.deepcopy(CLIP)
    with torch.no_grad():
        next(other.tower.parameters()).mul_(1 + world.rank)
    outcome = finetune(other, TRAIN, TASK, settings, PROBE, seed=1, world=world)
    return replace(outcome, model={name: value.numpy() for name, value in outcome.model.items()})


def mistaken(world: World) -> None:
    def find() -> None:
        raise UsageError(f"found by process {world.rank}")

    world.from_first(find)


def fails_alone(folder: Path) -> None:
    """For a process of its own: the second finds the disk full, while the first waits for it and heeds no signal."""
    from retrieve_or_generate.finetune.processes import assembled

    with assembled("cpu") as (world, _), Checkpoint(folder, KEY, world=world).heeding_sigterm():
        if world.rank:
            raise OSError(errno.ENOSPC, "No space left on device", "state")
        world.wait()


def summed(world: World) -> list[list[float] | None]:
    """Gradients of three parameters: one that both have, one that only the second has, one that nobody has."""
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (world.rank + 1)
    if world.rank:
        parameters[1].grad = torch.tensor([5.0, 6.0])
    world.add_gradients(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def dies(rank: int) -> None:
    """For a process of its own: join, and be killed there."""
    from retrieve_or_generate.finetune.processes import assembled

    with assembled("cpu") as (world, _):
        if world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        world.wait()


def loads_own(world: World, folder: Path) -> None:
    """The checkpoint of a folder that each process has for itself."""
    Checkpoint(folder / str(world.rank), KEY, world=world).load()


def short_at_the_last_step(world: World, settings: FinetuneSettings) -> None:
    """The second process finds no memory for the optimizer, when the first has taken its step already."""
    learner = Learner(classifier_of(settings), TRAIN, settings, recipe.plan(settings, len(TRAIN)), 1e-3, 1, world=world)

    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if world.rank:
        learner.descent.optimizer.step = refuse  # type: ignore[method-assign, assignment]
    learner.step()
