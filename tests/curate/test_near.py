"""Blocks, groups and the line save work, never a pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate import near
from retrieve_or_generate.curate.near import Comparison, copies, cosine_comparison, cosines, surplus


def _unit(rng: np.random.Generator, n: int) -> np.ndarray:
    vectors = rng.normal(size=(n, 3))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _small_blocks(patch: pytest.MonkeyPatch, block: int) -> None:
    for name in ("_BLOCK", "_STEP", "_GROUP", "_COLUMNS", "_LOOKED_AT"):
        patch.setattr(near, name, block)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(0, 12), st.integers(1, 7), st.booleans())
def test_copies_are_all_pairs_from_the_threshold_on(seed: int, n: int, m: int, block: int, on_a_line: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = _unit(rng, n), _unit(rng, m)
    comparison = cosine_comparison(a, b, 0.6)
    if on_a_line:  # a chord of unit vectors with cosine 0.6 is 0.894 long
        comparison = Comparison(a, b, 0.5, cosines(a, b, 0.6), (a[:, 0], b[:, 0]), 0.9)
    with pytest.MonkeyPatch.context() as patch:
        _small_blocks(patch, block)
        i, j = copies(comparison)
    expected = np.argwhere(np.einsum("nd,md->nm", a, b) >= 0.6)
    assert np.stack([i, j], 1).tolist() == expected.tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 20), st.integers(1, 9))
def test_surplus_goes_down_from_the_best_whatever_the_blocks(seed: int, n: int, block: int) -> None:
    a = _unit(np.random.default_rng(seed), n)
    on_a_line = Comparison(a, a, 0.8, cosines(a, a, 0.9), (a[:, 0], a[:, 0]), 0.45)
    with pytest.MonkeyPatch.context() as patch:
        _small_blocks(patch, block)
        goes = surplus([cosine_comparison(a, a, 0.95), on_a_line], n)
    expected = np.zeros(n, bool)
    for row in range(n):
        stays = np.flatnonzero(~expected[:row])
        expected[row] = (np.einsum("nd,d->n", a[stays], a[row]) >= 0.9).any()
    assert np.array_equal(goes, expected)


def test_a_confirmation_only_takes_away() -> None:
    a = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    comparison = cosine_comparison(a, a, 0.5).confirmed(lambda i, j: (i + j) % 2 == 1)
    i, j = copies(comparison)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == {(0, 1), (1, 0), (1, 2), (2, 1)}


@pytest.mark.slow
def test_a_hundred_thousand_pictures_need_no_square_of_memory() -> None:
    import resource

    from retrieve_or_generate.curate import thumbnail

    rng = np.random.default_rng(0)
    n, copied = 100_000, 5_000
    cells = rng.normal(size=(n, 3, 16)).astype(np.float32) @ rng.normal(size=(16, 256)).astype(np.float32)
    pixels = np.clip(rng.normal(128, 40, (n, 1, 1)) + 12 * cells, 0, 255).astype(np.uint8).reshape(n, 3, 16, 16)
    described = np.concatenate([thumbnail.describe(pixels[i : i + 4096]) for i in range(0, n, 4096)])
    described[-copied:] = described[:copied] + rng.uniform(-2, 2, (copied, described.shape[1])).astype(np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    goes = surplus([thumbnail.comparison(described, described)], n)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert goes[-copied:].all()
    assert goes.sum() == copied
    assert grown < 1, f"{grown:.2f} GiB more; the square of {n} rows is 37"


@pytest.mark.gpu
def test_a_gpu_finds_the_same_pairs() -> None:
    a = _unit(np.random.default_rng(0), 3000)
    comparison = cosine_comparison(a, a, 0.99)
    for here, there in zip(copies(comparison), copies(comparison, "cuda"), strict=True):
        assert np.array_equal(here, there)
    assert np.array_equal(surplus([comparison], 3000), surplus([comparison], 3000, "cuda"))
