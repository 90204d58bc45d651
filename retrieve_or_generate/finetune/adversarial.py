"""Adversarial training: images changed by up to ε so that the classifier errs, and trained on so (PGD, arXiv 1706.06083)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.draws import Draws
from retrieve_or_generate.settings import AdversarialSettings


def as_floats(pixels: Tensor) -> Tensor:
    """(b, 3, s, s) uint8 or float in [0, 1] to float in [0, 1]."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def random_start(pixels: Tensor, settings: AdversarialSettings, draws: Draws) -> Tensor:
    """`pixels` in [0, 1], each moved at random by up to ε; from `draws`, on the CPU, comes the seed of their device's own."""
    reach, device = settings.epsilon / 255, pixels.device
    generator = torch.Generator(device).manual_seed(draws.seed())
    noise = torch.rand((draws.count, *pixels.shape[1:]), generator=generator, device=device)
    return (pixels + (2 * noise[draws.rows] - 1) * reach).clamp(0, 1)


def attacked(
    classifier: Classifier, pixels: Tensor, start: Tensor, labels: Tensor, settings: AdversarialSettings
) -> Tensor:
    """From `start`, steps up the sign of the loss's gradient, always within ε of `pixels` and within [0, 1].

    Images do not look at each other, so the attack is the same whatever the batch. Parameters keep the gradients they had.
    """
    reach, step = settings.epsilon / 255, settings.length / 255
    low, high = (pixels - reach).clamp(0, 1), (pixels + reach).clamp(0, 1)
    moved = start
    for _ in range(settings.steps):
        moved = moved.detach().requires_grad_()
        loss = F.cross_entropy(classifier(moved), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = torch.minimum(torch.maximum(moved.detach() + step * gradient.sign(), low), high)
    return moved
