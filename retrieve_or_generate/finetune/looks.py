"""Looks at a classifier under way: what validation says of it at one moment, and which of them it prefers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.evaluate import linear_probe


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
