"""Copies are found whatever their size or encoding, and pictures that only look alike are not copies."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieve_or_generate.curate import near, thumbnail
from retrieve_or_generate.curate.thumbnail import describe
from retrieve_or_generate.pixels import decode, decode_all, encode_jpeg
from retrieve_or_generate.pocket.pictures import TASKS, evaluation_split


def _all(pixels: np.ndarray) -> np.ndarray:
    return describe(np.ascontiguousarray(pixels))


def copies(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return near.copies(thumbnail.comparison(a, b))


def _evaluation(task: str, split: str = "val", most: int = 80) -> np.ndarray:
    return decode_all([picture.jpeg for picture in evaluation_split(task, split)[:most]], 32)


def _each(pixels: np.ndarray, change: object) -> np.ndarray:
    return np.stack([change(np.ascontiguousarray(one.transpose(1, 2, 0))) for one in pixels]).transpose(0, 3, 1, 2)  # type: ignore[operator]


def _saved(image: np.ndarray, kind: str, quality: int, size: int = 32) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC).save(buffer, kind, quality=quality)
    return np.asarray(Image.fromarray(decode(buffer.getvalue())).resize((32, 32), Image.Resampling.BICUBIC))


CHANGES = {
    "JPEG 90": lambda image: decode(encode_jpeg(image, 90)),
    "JPEG 75": lambda image: decode(encode_jpeg(image, 75)),
    "JPEG 60": lambda image: decode(encode_jpeg(image, 60)),
    "JPEG 75, chroma at half size": lambda image: _saved(image, "JPEG", 75),
    "WebP 75": lambda image: _saved(image, "WEBP", 75),
    "doubled, JPEG 60": lambda image: _saved(image, "JPEG", 60, size=64),
    "224 pixels, JPEG 75": lambda image: _saved(image, "JPEG", 75, size=224),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_still_the_picture(task: str, name: str) -> None:
    pixels = _evaluation(task)
    i, j = copies(_all(_each(pixels, CHANGES[name])), _all(pixels))
    assert np.array_equal(i, np.arange(len(pixels)))
    assert np.array_equal(j, i)


@pytest.mark.parametrize("task", TASKS)
def test_pictures_of_one_task_are_not_copies_of_each_other(task: str) -> None:
    pixels = np.concatenate([_evaluation(task, split, most=1000) for split in ("val", "test")])
    i, j = copies(_all(pixels), _all(pixels))
    assert np.array_equal(i, j)


def test_any_size_gives_the_same_thumbnails() -> None:
    image = evaluation_split("aircraft", "val")[0].jpeg
    small = describe(decode_all([image], 32))
    for size in (50, 64, 224):
        large = np.asarray(Image.fromarray(decode(image)).resize((size, size), Image.Resampling.BICUBIC))
        assert copies(_all(large.transpose(2, 0, 1)[None]), small)[0].tolist() == [0]


def test_fine_patterns_of_one_average_are_told_apart() -> None:
    grid = np.indices((32, 32)) // 2 % 2
    patterns = [np.where(pattern, 90, 160) for pattern in (grid[0], grid[1], grid[0] ^ grid[1])]
    pixels = np.stack([np.repeat(pattern[None], 3, 0) for pattern in patterns]).astype(np.uint8)
    i, j = copies(_all(pixels), _all(pixels))
    assert np.array_equal(i, j)


def test_colour_tells_pictures_apart() -> None:
    pixels = np.zeros((2, 3, 32, 32), np.uint8)
    pixels[0] = np.array([130, 90, 100])[:, None, None]
    pixels[1] = np.array([90, 110, 100])[:, None, None]
    i, j = copies(_all(pixels), _all(pixels))
    assert np.array_equal(i, j)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 12), st.integers(1, 5))
def test_neither_gate_nor_line_loses_a_pair(seed: int, n: int, m: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (3, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    noise = rng.normal(0, rng.uniform(0, 12, (n + m, 1, 1, 1)), (n + m, 3, 32, 32))
    pixels = np.clip(base[rng.integers(0, 3, n + m)] + noise, 0, 255).astype(np.uint8)
    a, b = _all(pixels[:n]), _all(pixels[n:])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_BLOCK", "_STEP", "_GROUP", "_COLUMNS", "_LOOKED_AT"):
            patch.setattr(near, name, block)
        i, j = copies(a, b)
    rows, columns = np.divmod(np.arange(n * m), max(m, 1))
    agree = thumbnail.agree(a[rows], b[columns])
    assert np.array_equal(i, rows[agree])
    assert np.array_equal(j, columns[agree])
    back_j, back_i = copies(b, a)
    assert set(zip(i, j, strict=True)) == set(zip(back_i, back_j, strict=True))
