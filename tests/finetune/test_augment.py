from __future__ import annotations

import torch

from retrieve_or_generate.finetune.augment import cropped, shifted


def test_shifting_moves_each_image_whole_and_repeats_its_edge() -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = shifted(images, torch.Generator().manual_seed(5))
    top, left = torch.randint(-2, 3, (2, 6, 1), generator=torch.Generator().manual_seed(5)).squeeze(-1).tolist()
    assert moved.dtype == torch.uint8
    for image, result, down, right in zip(images, moved, top, left, strict=True):
        for row, column in ((0, 0), (31, 31), (3, 17), (30, 1)):
            source = image[:, min(max(row + down, 0), 31), min(max(column + right, 0), 31)]
            assert result[:, row, column].tolist() == source.tolist()


def test_cropping_keeps_flat_images_and_the_range_and_enlarges_by_up_to_a_twentieth() -> None:
    flat = torch.full((4, 3, 32, 32), 51, dtype=torch.uint8)
    torch.testing.assert_close(cropped(flat, torch.Generator().manual_seed(0)), flat / 255)
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(4, 3, 32, 32)
    result = cropped(ramp, torch.Generator().manual_seed(0))
    assert 0 <= result.min() <= result.max() <= 1
    slope = (result[:, 0, 16, 24] - result[:, 0, 16, 8]) / 16 * 255 / 8
    assert ((slope > 0.9**0.5 - 0.01) & (slope < 1.01)).all()


def test_the_generator_decides() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for augment in (shifted, cropped):
        one, same, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
