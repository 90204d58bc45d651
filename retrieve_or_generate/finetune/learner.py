"""A classifier on its way along a plan: what one update takes, and all that lies between two of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.endings import is_out_of_memory
from retrieve_or_generate.finetune import recipe
from retrieve_or_generate.finetune.adversarial import as_floats, attacked, random_start
from retrieve_or_generate.finetune.augment import cropped, flipped, resized, shifted
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.contrastive import Paired
from retrieve_or_generate.finetune.data import LabelledImages
from retrieve_or_generate.finetune.distributed import ALONE, MemoryElsewhereError, World
from retrieve_or_generate.finetune.draws import Draws, sent
from retrieve_or_generate.finetune.feed import Feed
from retrieve_or_generate.finetune.mixing import batches_of
from retrieve_or_generate.models import plain_attention
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings


class Learner:
    """Trains `classifier` on `train` at one peak `rate`. `seed` gives data order and augmentation.

    `images_per_pass` of a batch go through the network at once, all of them unless memory is too small; the update is the same.
    In a `world` of several processes each takes its share of every batch, and all make the same update.
    """

    def __init__(
        self,
        classifier: Classifier,
        train: LabelledImages,
        settings: FinetuneSettings,
        plan: recipe.Plan,
        rate: float,
        seed: int,
        images_per_pass: int | None = None,
        world: World = ALONE,
    ):
        self.classifier, self.settings, self.world = classifier, settings, world
        self.labels = train.labels
        self.order, weights = batches_of(train, settings, seed)
        self.weights = None if weights is None else weights.to(classifier.device)
        self.counts = deque[int]()
        self.feed = Feed(train.images, shares(self.order, world, self.counts), classifier.device)
        self.draw = torch.Generator().manual_seed(seed_for("finetune", "augmentation", seed))
        groups = [(list[Tensor](classifier.tower.parameters()), 1.0)]
        if isinstance(classifier, Paired):
            groups.append((list[Tensor](classifier.text.parameters()), 1.0))
        else:
            groups.append((list[Tensor](classifier.head.parameters()), settings.head_learning_rate_factor))
        self.descent = recipe.Descent(groups, plan, rate, settings.weight_decay, world)
        self.images_per_pass = images_per_pass or settings.batch_size
        self._losses: list[Tensor] = []

    @property
    def update(self) -> int:
        """How many were made."""
        return self.descent.update

    def step(self) -> int:
        """One update; how many images it saw."""
        rows, images = next(self.feed)
        count = self.counts.popleft()
        draws = Draws(self.draw, count, self.world.part(count))
        labels = torch.from_numpy(self.labels[rows])
        augmented = self._augmented(images, draws)
        paired = self.classifier if isinstance(self.classifier, Paired) else None
        targets = paired.drawn_captions(labels, draws) if paired else sent(labels, images.device)
        start = None
        if self.settings.adversarial:
            augmented = as_floats(augmented)
            start = random_start(augmented, self.settings.adversarial, draws)
        while not self._fits(augmented, targets, start, count):
            self.images_per_pass = math.ceil(self._most_in_pass(count) / 2)
        if paired:
            paired.bound_scale()
        return count

    def _augmented(self, images: Tensor, draws: Draws) -> Tensor:
        """At the model's size: as the recipe has it, mirrored where that is asked for."""
        size = self.classifier.image_size
        paper = self.settings.recipe == "paper"
        augmented = cropped(images, draws, size) if paper else resized(shifted(images, draws), size)
        return flipped(augmented, draws) if self.settings.flip else augmented

    def _most_in_pass(self, count: int) -> int:
        """Images that go through at once, of a batch of `count`, in the process that has most of them."""
        return min(self.images_per_pass, self.world.largest_part(count))

    def _fits(self, images: Tensor, targets: Tensor, start: Tensor | None, count: int) -> bool:
        """Make the update, or find that passes of this size are too large for the memory; then nothing has changed.

        No part of the network looks across images, so passes change the gradient by no more than rounding. `targets` are labels,
        or captions; `start` is where an attack on the images begins. They are this process's share of a batch of `count`.
        """
        parts: list[Tensor] = []
        try:
            with plain_attention(images.device):
                self.descent.step(self._losses_of(images, targets, start, count, parts))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self._most_in_pass(count) == 1:
                raise
            if not isinstance(error, MemoryElsewhereError):
                self.world.check_memory(short=True)
        else:
            loss = torch.stack(parts).sum() if parts else torch.zeros((), device=images.device)
            self._losses.append(self.world.sum(loss))  # a tensor, so that no device has to be waited for
            return True
        if images.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _losses_of(
        self, images: Tensor, targets: Tensor, start: Tensor | None, count: int, parts: list[Tensor]
    ) -> Iterator[Tensor]:
        """The mean loss of the whole batch in parts, one a pass of this process; their values go to `parts`."""
        if isinstance(self.classifier, Paired):
            most, weights = self.images_per_pass, self.weights
            yield from self.classifier.losses_in_passes(images, targets, most, parts, count, weights, self.world)
            return
        weights = None if self.weights is None else self.weights[self.world.part(count)]
        for first in range(0, len(targets), self.images_per_pass):
            some = slice(first, first + self.images_per_pass)
            seen, labels = images[some], targets[some]
            if start is not None and self.settings.adversarial:
                seen = attacked(self.classifier, seen, start[some], labels, self.settings.adversarial)
            logits = self.classifier(seen)
            if weights is None:
                loss = F.cross_entropy(logits, labels) * (len(labels) / count)
            else:
                loss = F.cross_entropy(logits, labels, reduction="none") @ weights[some]
            parts.append(loss.detach())
            yield loss

    @property
    def last_loss(self) -> Tensor:
        """Of the last update, before it was made, where it was computed: asking for it waits for no device."""
        return self._losses[-1]

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
        self._losses = list(state["losses"].to(self.classifier.device))
        for _ in range(state["update"]):
            next(self.order)


def shares(order: Iterator[np.ndarray], world: World, counts: deque[int]) -> Iterator[np.ndarray]:
    """The rows of each batch that are this process's; how many the batch has goes to `counts`.

    No method, for what waits in it would keep its learner, and with that the images of a rate that is over.
    """
    for batch in order:
        counts.append(len(batch))
        yield batch[world.part(len(batch))]
