"""Training-time augmentation of a whole batch in one operation, all that is random about it drawn before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retrieve_or_generate.finetune.draws import Draws, sent

_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after so many
_AREA, _LOG_RATIO = (0.9, 1.0), (math.log(3 / 4), math.log(4 / 3))
_REACH = 2  # of the bicubic kernel, in pixels of the larger grid
_A = -0.5  # its parameter, Pillow's


def shifted(images: Tensor, draws: Draws) -> Tensor:
    """(b, 3, s, s) uint8, each moved by up to a sixteenth of its side both ways, edge pixels repeated; uint8."""
    _, channels, height, width = images.shape
    most = max(1, height // 16)
    top, left = sent(draws.integers(-most, most + 1, 2), images.device)[..., None]
    rows = (top + torch.arange(height, device=images.device)).clamp(0, height - 1)
    columns = (left + torch.arange(width, device=images.device)).clamp(0, width - 1)
    rows = rows[:, None, :, None].expand(-1, channels, -1, width)
    columns = columns[:, None, None, :].expand(-1, channels, height, -1)
    return images.gather(2, rows).gather(3, columns)


def flipped(images: Tensor, draws: Draws) -> Tensor:
    """(b, 3, s, s) of any type, half of them mirrored, left to right."""
    mirrored = sent(draws.uniform() < 0.5, images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def cropped(images: Tensor, draws: Draws, size: int | None = None) -> Tensor:
    """(b, 3, w, w) uint8 to (b, 3, size, size) float in [0, 1]; `size` is w unless said: open_clip's training transform.

    That is torchvision's RandomResizedCrop(size, scale=(0.9, 1), interpolation=BICUBIC), ratios from 3/4 to 4/3 and all: a box of
    whole pixels of 90 to 100 % of the area, resized with antialiasing as Pillow does it, but for its rounding to whole numbers.
    """
    tops, heights, lefts, widths = drawn_boxes(images.shape[-1], draws)
    side = size or images.shape[-1]
    return _resampled(images, (tops, heights), (lefts, widths), side)


def resized(images: Tensor, size: int) -> Tensor:
    """(b, 3, w, w) uint8 to (b, 3, size, size) float in [0, 1], bicubic with antialiasing; untouched if already that size."""
    if images.shape[-1] == size:
        return images
    whole = torch.zeros(len(images)), torch.full((len(images),), float(images.shape[-1]))
    return _resampled(images, whole, whole, size)


def drawn_boxes(side: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, height, left and width (b,) of a crop in each of b squares, float32 whole numbers of pixels, on the CPU.

    Of ten boxes that are drawn for each the first that fits is taken, and the whole square where none does.
    """
    area, ratio = draws.uniform(2, _ATTEMPTS)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * side**2
    ratio = (_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio).exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= side) & (height <= side)
    first = fits.int().argmax(0, keepdim=True)
    any_fits = fits.any(0)
    width, height = (torch.where(any_fits, one.gather(0, first)[0], float(side)) for one in (width, height))
    down, across = draws.uniform(2)
    top, left = (down * (side - height + 1)).floor(), (across * (side - width + 1)).floor()
    return top, height, left, width


def _resampled(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], size: int) -> Tensor:
    """The boxes of (b, 3, w, w) uint8 images that start and reach as said, (b,) each, as (b, 3, size, size) float in [0, 1].

    A resize is a product with one matrix of weights from each side, so a batch of boxes is two products.
    """
    side = images.shape[-1]
    boxes = ((sent(start, images.device), sent(length, images.device)) for start, length in (rows, columns))
    down, across = (_weights(*box, side, size)[:, None] for box in boxes)  # (b, 1, size, w)
    across = across.transpose(2, 3)
    return (down @ (images.float() / 255 @ across)).clamp_(0, 1)


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(b, size, side): what each of `size` pixels takes of each of `side`, when those in the box from `start` on become `size`.

    Pillow's: the kernel is stretched where the box is larger than `size`, and ends at the box.
    """
    scale = (length / size)[:, None, None]  # (b, 1, 1)
    start, length = start[:, None, None], length[:, None, None]
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (b, size, 1)
    place = torch.arange(side, device=start.device) + 0.5  # (side,)
    weights = _bicubic((place - centre) / scale.clamp(min=1))
    weights = weights * ((place > start) & (place < start + length))
    return weights / weights.sum(2, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel."""
    x = x.abs()
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return torch.where(x < 1, near, torch.where(x < _REACH, far, 0.0))
