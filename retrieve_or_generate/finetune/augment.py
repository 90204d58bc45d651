"""Training-time augmentation of a whole batch in one operation, drawn from a generator on the CPU: no device changes a number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """(b, 3, s, s) uint8, each moved by up to a sixteenth of its side both ways, edge pixels repeated; uint8."""
    batch, channels, height, width = images.shape
    most = max(1, height // 16)
    top, left = torch.randint(-most, most + 1, (2, batch, 1), generator=generator).to(images.device)
    rows = (top + torch.arange(height, device=images.device)).clamp(0, height - 1)
    columns = (left + torch.arange(width, device=images.device)).clamp(0, width - 1)
    rows = rows[:, None, :, None].expand(-1, channels, -1, width)
    columns = columns[:, None, None, :].expand(-1, channels, height, -1)
    return images.gather(2, rows).gather(3, columns)


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """(b, 3, s, s) uint8 to float in [0, 1]: a random square of 90 to 100 % of the area, resized back (bicubic).

    open_clip's training transform, RandomResizedCrop(scale=(0.9, 1)), without its small changes of aspect ratio.
    """
    batch = len(images)
    area, across, down = torch.rand(3, batch, generator=generator).to(images.device)
    side = (0.9 + 0.1 * area).sqrt()
    free = 1 - side  # of [−1, 1]: how far the centre may move
    theta = torch.zeros(batch, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (2 * across - 1) * free, (2 * down - 1) * free
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images.float() / 255, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return sampled.clamp(0, 1)
