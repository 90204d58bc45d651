from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from retrieve_or_generate.finetune.augment import cropped, drawn_boxes, flipped, resized, shifted
from retrieve_or_generate.finetune.draws import Draws


def drawn(seed: int, images: int, rows: slice | None = None) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), images, rows or slice(None))


def test_shifting_moves_each_image_whole_and_repeats_its_edge() -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = shifted(images, drawn(5, 6))
    top, left = torch.randint(-2, 3, (2, 6, 1), generator=torch.Generator().manual_seed(5)).squeeze(-1).tolist()
    assert moved.dtype == torch.uint8
    for image, result, down, right in zip(images, moved, top, left, strict=True):
        for row, column in ((0, 0), (31, 31), (3, 17), (30, 1)):
            source = image[:, min(max(row + down, 0), 31), min(max(column + right, 0), 31)]
            assert result[:, row, column].tolist() == source.tolist()


def smooth(count: int, side: int) -> torch.Tensor:
    """(count, 3, side, side) uint8 waves: a resize that rounds halfway does not overshoot on them."""
    place = torch.arange(side) / side * 6
    phase = torch.arange(count * 3).view(count, 3, 1, 1)
    return (127 + 60 * torch.sin(place[:, None] + phase) + 60 * torch.cos(1.7 * place - phase)).to(torch.uint8)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (37, 32), (256, 224), (64, 24)])
def test_a_crop_is_pillows(side: int, size: int) -> None:
    images = smooth(8, side)
    result = cropped(images, drawn(3, 8), size)
    boxes = torch.stack(drawn_boxes(side, drawn(3, 8)), 1).int().tolist()
    assert len({tuple(box) for box in boxes}) > 4
    for image, ours, (top, height, left, width) in zip(images, result, boxes, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        theirs = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(ours.numpy() * 255 - theirs).max() < 1.6  # it rounds twice


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, 256, 256)
        theirs = np.array([RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    top, height, left, width = (one.numpy() for one in drawn_boxes(256, drawn(0, 20_000)))
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + height).max(), (left + width).max()) == (256, 256)
    whole = [
        ((rows[:, 2] == 256) & (rows[:, 3] == 256)).mean() for rows in (theirs, np.stack([top, left, height, width], 1))
    ]
    assert whole[0] == pytest.approx(whole[1], abs=0.02)  # where ten boxes did not fit
    for place, ours in enumerate((top, left, height, width)):
        assert ours.mean() == pytest.approx(theirs[:, place].mean(), abs=0.4)
        assert np.quantile(ours, [0.1, 0.5, 0.9]) == pytest.approx(
            np.quantile(theirs[:, place], [0.1, 0.5, 0.9]), abs=2
        )


def test_crops_stay_in_range_and_keep_flat_images() -> None:
    flat = torch.full((4, 3, 32, 32), 51, dtype=torch.uint8)
    torch.testing.assert_close(cropped(flat, drawn(0, 4)), flat / 255)
    hard = 255 * torch.randint(0, 2, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = cropped(hard, drawn(0, 4))
    assert (result.min(), result.max()) == (0, 1)


def test_resizing_is_pillows_and_nothing_where_nothing_is_to_do() -> None:
    images = smooth(2, 48)
    assert resized(images, 48) is images
    theirs = [
        Image.fromarray(one.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC) for one in images
    ]
    expected = torch.from_numpy(np.stack([np.asarray(one) for one in theirs])).permute(0, 3, 1, 2)
    assert (resized(images, 32) * 255 - expected).abs().max() < 1.6


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.arange(400, dtype=torch.float32).view(-1, 1, 1, 2).expand(200, 3, 4, 2)
    result = flipped(images, drawn(0, 200))
    mirrored = (result == images.flip(3)).flatten(1).all(1)
    assert torch.equal(result[~mirrored], images[~mirrored])
    assert 70 < mirrored.sum() < 130


def test_the_generator_decides() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for augment in (shifted, cropped, flipped):
        one, same, other = (augment(images, drawn(seed, 8)) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_a_share_of_a_batch_is_augmented_as_in_the_whole() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for augment in (shifted, cropped, flipped):
        whole = augment(images, drawn(1, 8))
        for rows in (slice(0, 5), slice(5, 8), slice(8, 8)):
            torch.testing.assert_close(augment(images[rows], drawn(1, 8, rows)), whole[rows])
