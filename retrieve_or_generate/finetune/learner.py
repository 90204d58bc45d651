"""A classifier on its way along a plan: what one update takes, and all that lies between two of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.finetune import recipe
from retrieve_or_generate.finetune.augment import cropped, shifted
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.data import LabelledImages
from retrieve_or_generate.models import plain_attention
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings


class Learner:
    """Trains `classifier` on `train` at one peak `rate`. `seed` gives data order and augmentation."""

    def __init__(
        self,
        classifier: Classifier,
        train: LabelledImages,
        settings: FinetuneSettings,
        plan: recipe.Plan,
        rate: float,
        seed: int,
    ):
        self.classifier, self.settings = classifier, settings
        self.images = torch.from_numpy(train.images).to(classifier.device)
        self.labels = torch.from_numpy(train.labels).to(classifier.device)
        self.order = recipe.batches(settings, len(train), seed)
        self.draw = torch.Generator().manual_seed(seed_for("finetune", "augmentation", seed))
        groups = [
            (list[Tensor](classifier.tower.parameters()), 1.0),
            (list[Tensor](classifier.head.parameters()), settings.head_learning_rate_factor),
        ]
        self.descent = recipe.Descent(groups, plan, rate, settings.weight_decay)
        self._losses: list[Tensor] = []

    @property
    def update(self) -> int:
        """How many were made."""
        return self.descent.update

    def step(self) -> int:
        """One update; how many images it saw."""
        rows = torch.from_numpy(next(self.order)).to(self.labels.device)
        images, labels = self.images[rows], self.labels[rows]
        augmented = cropped(images, self.draw) if self.settings.recipe == "paper" else shifted(images, self.draw)
        with plain_attention(self.labels.device):
            loss = F.cross_entropy(self.classifier(augmented), labels)
            self.descent.step(loss)
        self._losses.append(loss.detach())  # a tensor, so that no device has to be waited for
        return len(labels)

    def mean_loss(self) -> float:
        """Of the updates since this was asked last, each before it was made."""
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        return loss

    def state(self) -> dict[str, Any]:
        """All that the next update follows from, `resume` gives back: tensors and plain values."""
        return {
            "update": self.update,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.descent.optimizer.state_dict(),
            "draw": self.draw.get_state(),
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Be where a learner of the same plan, images and seed was when it gave this `state`."""
        self.classifier.load_state_dict(state["classifier"])
        self.descent.optimizer.load_state_dict(state["optimizer"])
        self.descent.update = state["update"]
        self.draw.set_state(state["draw"])
        self._losses = list(state["losses"].to(self.labels.device))
        for _ in range(state["update"]):
            next(self.order)
