"""How a fine-tuning runs: how many updates, at which rate, on which images. Two recipes, one code.

`equal_updates` makes the same number of full batches at every scale. `paper` is that of 2406.05184 (section D.4 and its released
code): a number of passes, 500 warm-up updates and a cosine to zero over all of them, so small sets never leave the warm-up.
Both use AdamW with betas (0.9, 0.95), weight decay on all parameters, and gradients clipped to norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.finetune.distributed import ALONE, World, committed
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.settings import FinetuneSettings

PAPER_WARMUP_UPDATES = 500
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """`updates` in all, the first `warmup_updates` of them at a rising rate; validation is looked at after those in `looks`."""

    updates: int
    warmup_updates: int
    looks: tuple[int, ...]

    def rate(self, update: int) -> float:
        """Share of the peak learning rate at `update` (0-based): linear rise, then half a cosine to zero."""
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        return (1 + math.cos(math.pi * (update - self.warmup_updates) / (self.updates - self.warmup_updates))) / 2


def plan(settings: FinetuneSettings, images: int) -> Plan:
    """The plan for a training set of so many images; none means no update and one look at the model as it is."""
    if settings.recipe == "paper":
        updates, warmup = settings.epochs * math.ceil(images / settings.batch_size), PAPER_WARMUP_UPDATES
    else:
        updates = settings.updates if images else 0
        warmup = round(settings.warmup_fraction * updates)
    looks = {math.ceil(updates * part / settings.evaluations) for part in range(1, settings.evaluations + 1)}
    return Plan(updates, warmup, tuple(sorted(looks)))


def batches(settings: FinetuneSettings, images: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of one batch after another, without end: every image once before any comes again.

    Full batches across passes for `equal_updates`; passes that end in a smaller batch for `paper`. The order depends on the seed
    and the number of images alone.
    """
    rng = generator_for("finetune", "data order", seed)
    left = np.empty(0, np.int64)
    while True:
        left = np.concatenate([left, rng.permutation(images)])
        while len(left) >= settings.batch_size or (settings.recipe == "paper" and len(left)):
            yield left[: settings.batch_size]
            left = left[settings.batch_size :]


class Descent:
    """AdamW along a plan. `groups` are parameters with the factor of their learning rate; `world`, who else makes each update."""

    def __init__(
        self,
        groups: list[tuple[list[Tensor], float]],
        plan: Plan,
        peak_rate: float,
        weight_decay: float,
        world: World = ALONE,
    ):
        self.plan, self.update, self.world = plan, 0, world
        self.rates = [peak_rate * factor for _, factor in groups]
        self.parameters = [parameter for parameters, _ in groups for parameter in parameters]
        listed = [{"params": parameters} for parameters, _ in groups]
        self.optimizer = torch.optim.AdamW(listed, lr=peak_rate, betas=BETAS, weight_decay=weight_decay, fused=True)

    def step(self, losses: Iterable[Tensor]) -> None:
        """One update down the gradient of the sum of `losses` of all processes, each let go of before the next is made."""
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
            del loss
        self.world.add_gradients(self.parameters)
        with committed():
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.plan.rate(self.update)
            self.optimizer.step()
        self.update += 1
