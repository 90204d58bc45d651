"""Looks at a classifier under way: what validation says of it at one moment, which of them it prefers, and what test images say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.evaluate import linear_probe
from retrieve_or_generate.evaluate.zero_shot import accuracy
from retrieve_or_generate.finetune.classifier import Classifier, features_of
from retrieve_or_generate.finetune.contrastive import Paired
from retrieve_or_generate.finetune.data import LabelledImages, TaskImages
from retrieve_or_generate.finetune.distributed import World
from retrieve_or_generate.finetune.measured import Measured
from retrieve_or_generate.settings import ProbeSettings


@dataclass(frozen=True)
class Look:
    """The classifier at one moment of training and what validation says of it."""

    learning_rate: float
    update: int
    wise_ft: float
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
            "wise_ft": self.wise_ft,
            "zero_shot_val_accuracy": self.val_accuracy,
            "zero_shot_val_loss": self.val_loss,
            "linear_probe_val_accuracy": self.probe.val_accuracy,
            "linear_probe_val_loss": self.probe.val_loss,
            "C": self.probe.C,
        }

    def packed(self) -> dict[str, Any]:
        """What a checkpoint keeps; the probe follows from the features."""
        return {
            "learning_rate": self.learning_rate,
            "update": self.update,
            "wise_ft": self.wise_ft,
            "val_accuracy": float(self.val_accuracy),
            "val_loss": self.val_loss,
            "train_features": torch.from_numpy(self.train_features),
            "val_features": torch.from_numpy(self.val_features),
            "state": self.state,
        }


@dataclass
class Best:
    """The looks that validation prefers so far for zero-shot and for the probe: more right, else less loss, else the earlier."""

    zero_shot: Look | None = None
    probed: Look | None = None

    def offer(self, look: Look) -> None:
        best = self.zero_shot
        if best is None or (look.val_accuracy, -look.val_loss) > (best.val_accuracy, -best.val_loss):
            self.zero_shot = look
        if self.probed is None or look.probe.score > self.probed.probe.score:
            self.probed = look


@dataclass(frozen=True)
class Judge:
    """Asks the `classifier` about images of the `task`. Of the processes of a `world` the first one measures and fits probes."""

    classifier: Classifier
    task: TaskImages
    probe: ProbeSettings
    seed: int
    world: World

    def look(self, rate: float, update: int, alpha: float) -> Look | None:
        """What validation says of the classifier as it is; None where that gives something else than finite numbers."""
        if isinstance(self.classifier, Paired):
            self.classifier.rebuild_head()
        train_x, val_x = self._features([self.task.train, self.task.val])
        with torch.inference_mode():
            logits = self.classifier.head(val_x)
        finite = all(bool(values.isfinite().all()) for values in (train_x, val_x, logits))
        if self.world.any(not finite):
            return None
        right, loss = self.world.from_first(lambda: _zero_shot(logits.cpu(), self.task.val.labels))
        train_features, val_features = train_x.cpu().numpy(), val_x.cpu().numpy()
        selection = self._selection(train_features, val_features)
        state = copied(self.classifier.state_dict())
        return Look(rate, update, alpha, right, loss, selection, train_features, val_features, state)

    def unpacked(self, packed: dict[str, Any]) -> Look:
        """The look that `Look.packed` gave this."""
        features = {name: packed[name].numpy() for name in ("train_features", "val_features")}
        state = {name: value.to(self.classifier.device) for name, value in packed["state"].items()}
        return Look(**packed | features | {"state": state, "probe": self._selection(**features)})

    def test(self, zero_shot: Look, probed: Look) -> list[Measured]:
        """The task's own test images, then those of its shifts, through what was chosen."""
        shown = [self.task.test, *self.task.shifts.values()]
        self.classifier.load_state_dict(zero_shot.state)
        features = self._features(shown)
        with torch.inference_mode():
            logits = [self.classifier.head(x).cpu().numpy() for x in features]
        if probed is not zero_shot:
            self.classifier.load_state_dict(probed.state)
            features = self._features(shown)
        scores = self.world.from_first(lambda: (logits, self._probabilities(probed, features)))
        return [Measured(*one) for one in zip(shown, *scores, strict=True)]

    def _features(self, shown: Sequence[LabelledImages]) -> list[Tensor]:
        return [features_of(self.classifier, images.images, world=self.world) for images in shown]

    def _probabilities(self, look: Look, features: Sequence[Tensor]) -> list[np.ndarray]:
        """What the probe of `look`, refitted, says of each of `features`: (m, k) float32."""
        fitted = self._fitted_to(look.train_features, look.val_features)
        probe = linear_probe.refit(look.probe, *fitted, self.probe, self.seed)
        return [probe.probabilities(x).astype(np.float32) for x in features]

    def _selection(self, train_features: np.ndarray, val_features: np.ndarray) -> linear_probe.Selection:
        """The probe that validation prefers."""
        return self.world.from_first(
            lambda: linear_probe.select(*self._fitted_to(train_features, val_features), self.probe, self.seed)
        )

    def _fitted_to(
        self, train_features: np.ndarray, val_features: np.ndarray
    ) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray, int]:
        """What a probe is fitted to, the features on the model's device."""
        x, val_x = (
            torch.from_numpy(features).to(self.classifier.device) for features in (train_features, val_features)
        )
        return x, self.task.train.labels, val_x, self.task.val.labels, self.task.n_classes


def _zero_shot(logits: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and loss."""
    return accuracy(logits.numpy(), labels), F.cross_entropy(logits, torch.from_numpy(labels)).item()


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stays when the state changes."""
    return {name: value.detach().clone() for name, value in state.items()}
