"""Linear probe on frozen features: fitted on train, chosen on validation, refitted on both.

Two recipes. `regression`: multinomial logistic regression solved to a stated gradient for each C, the best on validation kept
(`regression.py`). `paper`: one layer trained by AdamW with nothing to choose (`adamw.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.evaluate.adamw import fit_adamw
from retrieve_or_generate.evaluate.probe import Features, Probe, check_labels
from retrieve_or_generate.evaluate.regression import fit_path
from retrieve_or_generate.evaluate.zero_shot import accuracy, mean_per_class_accuracy
from retrieve_or_generate.settings import ProbeSettings


@dataclass(frozen=True)
class Selection:
    """The probe that classifies validation features best of those fitted on the training features, and how well it does."""

    probe: Probe
    val_accuracy: float
    val_loss: float

    @property
    def C(self) -> float | None:
        return self.probe.C

    @property
    def score(self) -> tuple[float, float]:
        """Orders selections on different features: more right, else less loss."""
        return self.val_accuracy, -self.val_loss


@dataclass(frozen=True)
class ProbeResult:
    """`probabilities` (m, k) float64 and `predictions` (m,) of the test features, by `probe`, refitted on train and val."""

    selection: Selection
    probe: Probe
    probabilities: np.ndarray

    @property
    def C(self) -> float | None:
        return self.probe.C

    @property
    def predictions(self) -> np.ndarray:
        return self.probabilities.argmax(1)

    def accuracy(self, labels: np.ndarray) -> float:
        """Share of the test images that are right, in [0, 1]."""
        return accuracy(self.probabilities, labels)

    def mean_per_class_accuracy(self, labels: np.ndarray) -> float:
        """The same within each class, and the mean of those."""
        return mean_per_class_accuracy(self.probabilities, labels)


def linear_probe(
    train_x: Features,
    train_y: np.ndarray,
    val_x: Features,
    val_y: np.ndarray,
    test_x: Features,
    n_classes: int,
    settings: ProbeSettings,
    seed: int = 0,
) -> ProbeResult:
    """Choose on validation, refit on train and val together, classify `test_x`. Features (·, d) float32, labels (·,).

    Tensors are worked on where they lie, arrays on the CPU. `seed` matters to the paper's recipe alone.

    Raises:
        UsageError: features that are empty, not finite or of different widths; labels out of range; fewer than two classes.
    """
    selection = select(train_x, train_y, val_x, val_y, n_classes, settings, seed)
    probe = refit(selection, train_x, train_y, val_x, val_y, n_classes, settings, seed)
    return ProbeResult(selection, probe, probe.probabilities(test_x))


def select(
    train_x: Features,
    train_y: np.ndarray,
    val_x: Features,
    val_y: np.ndarray,
    n_classes: int,
    settings: ProbeSettings,
    seed: int = 0,
) -> Selection:
    """The probe of highest validation accuracy; of equals the one with the strongest regularisation (smallest C)."""
    check_labels(val_x, val_y, n_classes, "validation")
    probes = _fitted(train_x, train_y, n_classes, settings, seed)
    selections = [_on_validation(probe, val_x, val_y) for probe in probes]
    return max(selections, key=lambda selection: selection.val_accuracy)


def refit(
    selection: Selection,
    train_x: Features,
    train_y: np.ndarray,
    val_x: Features,
    val_y: np.ndarray,
    n_classes: int,
    settings: ProbeSettings,
    seed: int = 0,
) -> Probe:
    """The selected probe, fitted to train and validation features together."""
    x, y = _joined(train_x, val_x), np.concatenate([train_y, val_y])
    if selection.C is not None:
        settings = settings.model_copy(update={"inverse_regularisation": (selection.C,)})
    return _fitted(x, y, n_classes, settings, seed)[0]


def _fitted(x: Features, y: np.ndarray, n_classes: int, settings: ProbeSettings, seed: int) -> list[Probe]:
    """All that validation may choose from, the most strongly regularised first."""
    if settings.recipe == "paper":
        return [fit_adamw(x, y, n_classes, settings, seed)]
    return list(fit_path(x, y, n_classes, settings.inverse_regularisation))


def _on_validation(probe: Probe, x: Features, y: np.ndarray) -> Selection:
    p = probe.probabilities(x)
    loss = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean()
    return Selection(probe, accuracy(p, y), float(loss))


def _joined(a: Features, b: Features) -> Features:
    return torch.cat([a, b]) if isinstance(a, Tensor) and isinstance(b, Tensor) else np.concatenate([a, b])
