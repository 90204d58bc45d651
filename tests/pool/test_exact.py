"""Exact scores: the same float32 bits however pairs are scored together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.pool import exact as module
from retrieve_or_generate.pool.exact import ExactScores, pair_scores


def scored_by_row(xq: np.ndarray, xb: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    largest = float(np.linalg.norm(xb.astype(np.float64), axis=1).max())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MANY", 0)
        scores = ExactScores(torch.from_numpy(xq))
        return scores(torch.from_numpy(xb), largest, torch.from_numpy(query), torch.from_numpy(row)).numpy()


def test_a_score_is_the_sum_rounded_once() -> None:
    rng = np.random.default_rng(0)
    xq, xb = rng.standard_normal((3, 90)).astype(np.float32), rng.standard_normal((40, 90)).astype(np.float16)
    query, row = np.repeat(np.arange(3), 40), np.tile(np.arange(40), 3)
    expected = (xq[query].astype(np.float64) * xb[row].astype(np.float64)).sum(1).astype(np.float32)
    np.testing.assert_array_equal(pair_scores(xq, xb, query, row), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-4, 1.0, 50.0]), st.floats(0.001, 1.0))
def test_law_pairs_sorted_by_row_score_the_same_bits(seed: int, scale: float, share: float) -> None:
    rng = np.random.default_rng(seed)
    q, n, d = rng.integers(1, 20), rng.integers(1, 1500), rng.integers(1, 70)
    xq = (rng.standard_normal((q, d)) * scale).astype(np.float32)
    xb = (rng.standard_normal((n, d)) * scale).astype(np.float16)
    query, row = np.nonzero(rng.random((q, n)) < share)
    np.testing.assert_array_equal(scored_by_row(xq, xb, query, row), pair_scores(xq, xb, query, row))


def test_sums_between_two_float32_numbers_are_added_up_in_the_standard_order() -> None:
    half = np.float32(
        2.0**-24
    )  # 1 + half lies between two float32 numbers; what the last two terms leave depends on the order
    xq = np.array([[1, half, 2.0**-53, 2.0**-53, 0], [-1, 1, 0, 0, 0], [0, 0, 0, 0, -1]], np.float32)
    xb = np.ones((1, 5), np.float16)
    query, row = np.arange(3), np.zeros(3, np.int64)
    found = scored_by_row(np.tile(xq, (1, 8)), np.tile(xb, (1, 8)), query, row)
    np.testing.assert_array_equal(found, pair_scores(np.tile(xq, (1, 8)), np.tile(xb, (1, 8)), query, row))
    alone = scored_by_row(xq, xb, query, row)
    np.testing.assert_array_equal(alone, pair_scores(xq, xb, query, row))
    assert not np.signbit(alone[1])
