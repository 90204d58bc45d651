"""What a model said of every image of one test set, and the numbers that follow from it.

A shifted test set may show some of a task's classes only (200 of ImageNet's 1000 are in its renditions). The model is then asked
which of those it sees, as such sets are measured by those who made them: scores are restricted to classes that have an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieve_or_generate.evaluate.calibration import ece
from retrieve_or_generate.evaluate.zero_shot import accuracy, mean_per_class_accuracy, probabilities
from retrieve_or_generate.finetune.data import LabelledImages

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Measured:
    """`zero_shot_logits` and `linear_probe_probabilities` (m, k) float32 of `images`, over all k classes of the task."""

    images: LabelledImages
    zero_shot_logits: np.ndarray
    linear_probe_probabilities: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """Ids of the classes that have an image, ascending."""
        return np.unique(self.images.labels)

    def metrics_among(self, classes: np.ndarray) -> dict[str, float]:
        """The numbers when the choice is among `classes` alone, on their images alone."""
        if len(classes) == self.zero_shot_logits.shape[1]:
            return metrics_of(self.images.labels, self.zero_shot_logits, self.linear_probe_probabilities)
        rows = np.isin(self.images.labels, classes)
        labels = np.searchsorted(classes, self.images.labels[rows])
        p = self.linear_probe_probabilities[rows][:, classes].astype(np.float64)
        p /= np.maximum(p.sum(1, keepdims=True), _TINY)  # all nothing where the probe is sure of another class
        return metrics_of(labels, self.zero_shot_logits[rows][:, classes], p)

    def predictions(self, classes: np.ndarray) -> dict[str, np.ndarray]:
        """The class id that each use of the model gives each image, the choice being among `classes`."""
        scores = {"zero_shot": self.zero_shot_logits, "linear_probe": self.linear_probe_probabilities}
        return {name: classes[values[:, classes].argmax(1)] for name, values in scores.items()}


def metrics_of(labels: np.ndarray, zero_shot_logits: np.ndarray, probe_probabilities: np.ndarray) -> dict[str, float]:
    """The numbers of a trial from its predictions: (m,) labels, (m, k) logits and probabilities."""
    metrics = {}
    for name, scores in (("zero_shot", probabilities(zero_shot_logits)), ("linear_probe", probe_probabilities)):
        metrics[f"{name}_accuracy"] = accuracy(scores, labels)
        metrics[f"{name}_mean_per_class_accuracy"] = mean_per_class_accuracy(scores, labels)
        metrics[f"{name}_ece"] = ece(scores, labels)
    return metrics


def shift_record(own: Measured, shift: Measured) -> dict[str, object]:
    """What is kept of one shift: its numbers, and, where it shows some classes only, those of the own test images of these classes.

    Without these a drop under shift would be mixed with the choice being easier among fewer classes.
    """
    classes = shift.classes
    record: dict[str, object] = {
        "n_test": len(shift.images),
        "classes": len(classes),
        "metrics": shift.metrics_among(classes),
    }
    counted = int(np.isin(own.images.labels, classes).sum())
    if len(classes) < own.zero_shot_logits.shape[1] and counted:
        record |= {"test_n": counted, "test_metrics": own.metrics_among(classes)}
    return record
