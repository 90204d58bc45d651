"""One trial: train along the recipe, look at validation now and then, test what validation chose.

The learning rate and the moment of training are chosen on validation alone, once for zero-shot and once for the linear probe;
every look and both choices go to the history. Test images are shown to what was chosen and to nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate import linear_probe
from retrieve_or_generate.evaluate.zero_shot import accuracy
from retrieve_or_generate.finetune import recipe
from retrieve_or_generate.finetune.augment import cropped, shifted
from retrieve_or_generate.finetune.classifier import Classifier, features_of
from retrieve_or_generate.finetune.data import LabelledImages, TaskImages
from retrieve_or_generate.finetune.trial import TrialOutcome
from retrieve_or_generate.models import ImageModel, plain_attention
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings


def finetune(
    clip: ImageModel,
    train: LabelledImages | None,
    task: TaskImages,
    settings: FinetuneSettings | None = None,
    probe: ProbeSettings | None = None,
    *,
    seed: int,
) -> TrialOutcome:
    """Train a copy of `clip` on `train` and measure it on the test images of `task`; without `train`, measure it as it is.

    `seed` gives data order and augmentation. Equal seeds give equal bits on one thread of one machine. `clip` is left as it was.

    Raises:
        UsageError: images of another size, labels out of range, or training that diverged at every learning rate.
    """
    started = time.perf_counter()
    for what, images in (("training", train), ("task's train", task.train), ("val", task.val), ("test", task.test)):
        if images is not None:
            _check(images, what, clip.image_size, task.n_classes)
    work = _Work(clip, task, settings or FinetuneSettings(), probe or ProbeSettings(), seed)
    zero_shot, probed = work.choose(train)
    logits, probabilities = work.test(zero_shot, probed)
    return TrialOutcome(
        test=task.test,
        zero_shot_logits=logits,
        linear_probe_probabilities=probabilities,
        history=tuple(work.history),
        n_train=len(train) if train else 0,
        updates=recipe.plan(work.settings, len(train) if train else 0).updates,
        images_seen=work.images_seen,
        wall_seconds=time.perf_counter() - started,
        device=clip.device.type,
        precision=str(work.classifier.precision).removeprefix("torch."),
        model=zero_shot.state,
    )


def _check(images: LabelledImages, what: str, size: int, n_classes: int) -> None:
    if not len(images):
        raise UsageError(f"no {what} images")
    if images.images.shape[1:] != (3, size, size):
        raise UsageError(f"{what} images are {images.images.shape[1:]}, but the model takes {(3, size, size)}")
    low, high = images.labels.min(), images.labels.max()
    if low < 0 or high >= n_classes:
        raise UsageError(f"{what} labels go from {low} to {high}, but there are {n_classes} classes")


@dataclass(frozen=True)
class _Look:
    """The classifier at one moment of training and what validation says of it."""

    learning_rate: float
    update: int
    val_accuracy: float
    val_loss: float
    probe: linear_probe.Selection
    train_features: np.ndarray
    val_features: np.ndarray
    state: dict[str, Tensor]

    def row(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "update": self.update,
            "zero_shot_val_accuracy": self.val_accuracy,
            "zero_shot_val_loss": self.val_loss,
            "linear_probe_val_accuracy": self.probe.val_accuracy,
            "linear_probe_val_loss": self.probe.val_loss,
            "C": self.probe.C,
        }


@dataclass
class _Work:
    """One trial under way: a classifier, what it is measured on, and a history that grows."""

    clip: ImageModel
    task: TaskImages
    settings: FinetuneSettings
    probe: ProbeSettings
    seed: int
    history: list[dict[str, Any]] = field(default_factory=list)
    images_seen: int = 0

    def __post_init__(self) -> None:
        self.classifier = Classifier(self.clip, self.task.class_weights.to(self.clip.device), self.settings.precision)

    def choose(self, train: LabelledImages | None) -> tuple[_Look, _Look]:
        """The looks that validation prefers for zero-shot and for the probe: more right, else less loss, else the earlier."""
        zero_shot = probed = None
        for look in self._looks(train):
            if zero_shot is None or (look.val_accuracy, -look.val_loss) > (zero_shot.val_accuracy, -zero_shot.val_loss):
                zero_shot = look
            if probed is None or look.probe.score > probed.probe.score:
                probed = look
        if zero_shot is None or probed is None:
            rates = ", ".join(f"{rate:g}" for rate in self.settings.learning_rates)
            raise UsageError(f"training diverged at every learning rate ({rates}); set smaller finetune.learning_rates")
        for name, look in (("zero_shot", zero_shot), ("linear_probe", probed)):
            self.history.append({"chosen_for": name, "learning_rate": look.learning_rate, "update": look.update})
        return zero_shot, probed

    def test(self, zero_shot: _Look, probed: _Look) -> tuple[np.ndarray, np.ndarray]:
        """Test images through what was chosen: zero-shot logits and probe probabilities, (m, k) float32."""
        test_x = self._features_at(zero_shot, self.task.test)
        with torch.inference_mode():
            logits = self.classifier.head(test_x).cpu().numpy()
        if probed is not zero_shot:
            test_x = self._features_at(probed, self.task.test)
        y, val_y = self.task.train.labels, self.task.val.labels
        probe = linear_probe.refit(
            probed.probe, probed.train_features, y, probed.val_features, val_y, self.task.n_classes
        )
        return logits, probe.probabilities(test_x.cpu().numpy()).astype(np.float32)

    def _features_at(self, look: _Look, images: LabelledImages) -> Tensor:
        self.classifier.load_state_dict(look.state)
        return features_of(self.classifier, images.images)

    def _looks(self, train: LabelledImages | None) -> Iterator[_Look]:
        plan = recipe.plan(self.settings, len(train) if train else 0)
        if train is None or not plan.updates:
            yield self._look(0.0, 0, None)
            return
        start = _copied(self.classifier.state_dict())
        for rate in self.settings.learning_rates:
            self.classifier.load_state_dict(start)
            yield from self._trained(train, plan, rate)

    def _trained(self, train: LabelledImages, plan: recipe.Plan, rate: float) -> Iterator[_Look]:
        """Looks along the training at one peak rate; they end early where the loss is no longer a number."""
        images = torch.from_numpy(train.images).to(self.clip.device)
        labels = torch.from_numpy(train.labels).to(self.clip.device)
        draw = torch.Generator().manual_seed(seed_for("finetune", "augmentation", self.seed))
        head, tower = (list[Tensor](part.parameters()) for part in (self.classifier.head, self.classifier.tower))
        groups = [(tower, 1.0), (head, self.settings.head_learning_rate_factor)]
        descent = recipe.Descent(groups, plan, rate, self.settings.weight_decay)
        losses: list[Tensor] = []
        order = recipe.batches(self.settings, len(train), self.seed)
        for update, rows in zip(range(1, plan.updates + 1), order, strict=False):
            chosen = torch.from_numpy(rows).to(self.clip.device)
            losses.append(self._step(descent, images[chosen], labels[chosen], draw))
            if update in plan.looks:
                loss = torch.stack(losses).mean().item()
                losses.clear()
                if not math.isfinite(loss):
                    self.history.append({"learning_rate": rate, "update": update, "diverged": True})
                    return
                yield self._look(rate, update, loss)

    def _step(self, descent: recipe.Descent, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        """One update; the loss before it, as a tensor so that no device has to be waited for."""
        augmented = cropped(images, draw) if self.settings.recipe == "paper" else shifted(images, draw)
        with plain_attention(self.clip.device):
            loss = F.cross_entropy(self.classifier(augmented), labels)
            descent.step(loss)
        self.images_seen += len(labels)
        return loss.detach()

    def _look(self, rate: float, update: int, train_loss: float | None) -> _Look:
        train, val = self.task.train, self.task.val
        val_x = features_of(self.classifier, val.images)
        with torch.inference_mode():
            logits = self.classifier.head(val_x).cpu()
            loss = F.cross_entropy(logits, torch.from_numpy(val.labels)).item()
        train_features, val_features = features_of(self.classifier, train.images).cpu().numpy(), val_x.cpu().numpy()
        grid = self.probe.inverse_regularisation
        selection = linear_probe.select(
            train_features, train.labels, val_features, val.labels, self.task.n_classes, grid
        )
        right = accuracy(logits.numpy(), val.labels)
        state = _copied(self.classifier.state_dict())
        look = _Look(rate, update, right, loss, selection, train_features, val_features, state)
        self.history.append(look.row() | {"train_loss": train_loss})
        return look


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
