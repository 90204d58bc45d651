"""`recipe: paper` against a few lines written apart: head, schedule, weight decay and clipping, update by update.

The reference (section D.4 of 2406.05184 and its released code) shares with ours what is drawn, the order of the images and their
crops, and the gradients that torch's autograd gives; nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import open_clip
import pytest
import torch
from colours import coloured, make_clip
from torch import Tensor

from retrieve_or_generate.finetune import TaskImages, finetune, recipe
from retrieve_or_generate.finetune.augment import cropped
from retrieve_or_generate.finetune.draws import Draws
from retrieve_or_generate.models import Clip
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

NAMES, TEMPLATES = ["red", "green", "blue"], ["a {}", "some {} thing"]
SMALL: dict[str, object] = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
SEED = 3


def reference(clip: Clip, settings: FinetuneSettings, rate: float, epochs: int) -> tuple[list[float], list[Tensor]]:
    """The loss before each update, and the weights after the last: tower in the order of its parameters, then head."""
    train = coloured(23, seed=4)
    tower = make_clip(vision=SMALL).network.visual
    zero_shot = open_clip.build_zero_shot_classifier(clip.network, clip.tokenizer, NAMES, TEMPLATES)
    weight = (zero_shot.T * clip.network.logit_scale.exp()).detach().clone().requires_grad_()
    theta = [*tower.parameters(), weight, torch.zeros(3, requires_grad=True)]
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    order, draw = recipe.batches(settings, len(train), SEED), torch.Generator()
    draw.manual_seed(seed_for("finetune", "augmentation", SEED))
    per_epoch = math.ceil(len(train) / 8)
    losses = []
    for step in range(epochs * per_epoch):
        rows = next(order)
        assert len(rows) == (8 if (step + 1) % per_epoch else 23 % 8)  # a pass ends in what is left
        pixels = (cropped(torch.from_numpy(train.images[rows]), Draws(draw, len(rows))) - 0.5) / 0.28
        embedded = tower(pixels)
        logits = embedded / embedded.norm(dim=1, keepdim=True) @ theta[-2].T + theta[-1]
        loss = -logits.log_softmax(1)[range(len(rows)), train.labels[rows]].mean()
        gradients = torch.autograd.grad(loss, theta)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        if step < 500:
            lr = rate * (step + 1) / 500
        else:
            lr = rate / 2 * (1 + math.cos(math.pi * (step - 500) / (epochs * per_epoch - 500)))
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(theta, gradients, strict=True)):
                g = g * min(1, 1 / norm)
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
                p.mul_(1 - lr * 0.1)
                p -= lr * m[i] / (1 - 0.9 ** (step + 1)) / ((v[i] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        losses.append(loss.item())
    return losses, [p.detach() for p in theta]


# 6 updates, at a rate at which a tenth of the weight decay would show; 540, of which 40 on the cosine
@pytest.mark.parametrize(
    ("epochs", "rate", "apart"), [(2, 0.5, 2e-3), pytest.param(180, 5e-4, 2e-2, marks=pytest.mark.slow)]
)
def test_each_update_is_that_of_the_reference(
    epochs: int, rate: float, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(vision=SMALL)
    task = TaskImages(clip.class_weights(NAMES, TEMPLATES), *(coloured(12, seed=seed) for seed in (1, 2, 3)))
    settings = FinetuneSettings(recipe="paper", epochs=epochs, batch_size=8, learning_rates=(rate,), evaluations=1)
    losses: list[float] = []
    step = recipe.Descent.step

    def seen(descent: recipe.Descent, given: Iterable[Tensor]) -> None:
        (loss,) = given
        losses.append(loss.item())
        step(descent, [loss])

    monkeypatch.setattr(recipe.Descent, "step", seen)
    outcome = finetune(clip, coloured(23, seed=4), task, settings, ProbeSettings(), seed=SEED)
    expected, weights = reference(clip, settings, rate, epochs)
    assert outcome.updates == len(losses) == len(expected) == 3 * epochs
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=apart, atol=apart)
    names = [f"tower.{name}" for name, _ in clip.network.visual.named_parameters()] + ["head.weight", "head.bias"]
    start = dict(clip.network.visual.named_parameters())
    start["head.weight"], start["head.bias"] = (
        task.class_weights.T * clip.network.logit_scale.exp().item(),
        torch.zeros(3),
    )
    for name, weight in zip(names, weights, strict=True):
        before = start[name.removeprefix("tower.")].detach()
        ours, theirs = outcome.model[name] - before, weight - before
        if name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding errors, which Adam makes large
            ours[32:64] = theirs[32:64] = 0
        assert (ours - theirs).norm() < apart * theirs.norm(), name


def test_what_is_not_said_is_as_published_and_what_is_said_holds() -> None:
    paper = FinetuneSettings(recipe="paper")
    assert (paper.epochs, paper.batch_size, paper.learning_rates) == (30, 512, (5e-4, 1e-5, 1e-6))
    assert (paper.evaluations, paper.precision, paper.weight_decay) == (30, "float32", 0.1)
    mine = FinetuneSettings(recipe="paper", epochs=10, learning_rates=(1e-6,))
    assert (mine.epochs, mine.evaluations, mine.batch_size, mine.learning_rates) == (10, 10, 512, (1e-6,))
    assert FinetuneSettings.model_validate(mine.model_dump(mode="json")) == mine
    assert FinetuneSettings(recipe="equal_updates").batch_size == FinetuneSettings().batch_size != 512
