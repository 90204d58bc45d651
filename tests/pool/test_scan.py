"""`scan` against brute force: every product in float64, sorted by score and then row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.pool.scan import pair_scores, scan

DTYPES = [torch.bfloat16, torch.float32]


def brute_force(
    xq: np.ndarray, xb: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    scores = (xq.astype(np.float64) @ xb.astype(np.float64).T).astype(np.float32)
    D = np.full((len(xq), k), -np.inf, np.float32)
    I = np.full((len(xq), k), -1, np.int64)  # noqa: E741  the name that faiss gave it
    rows = np.arange(len(xb)) if allowed is None else np.flatnonzero(allowed)
    for i, row in enumerate(scores):
        best = rows[np.lexsort((rows, -row[rows]))][:k]
        D[i, : len(best)], I[i, : len(best)] = row[best], best
    return D, I


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    vectors = rng.standard_normal((n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """A few tight clusters: within one, scores differ by less than a bfloat16 product can tell."""
    centres = unit(rng, 5, d)
    near = centres[rng.integers(5, size=n)] + 1e-3 * rng.standard_normal((n, d)).astype(np.float32)
    return (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 100, 5000])
def test_equals_brute_force_over_shards_of_odd_sizes(k: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(k)
    xq, xb = unit(rng, 9, 48), unit(rng, 3001, 48).astype(np.float16)
    found = scan(xq, np.split(xb, [1, 640, 641, 2000]), k, block_rows=300, product_dtype=dtype)
    assert_same(found, brute_force(xq, xb, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_tighter_than_the_narrow_product_can_tell(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    xb = clustered(rng, 4000, 64)
    xq = xb[rng.integers(len(xb), size=12)].astype(np.float32)
    assert_same(scan(xq, [xb], 50, block_rows=512, product_dtype=dtype), brute_force(xq, xb, 50))


def test_ties_go_to_the_lower_row_across_blocks_and_shards() -> None:
    rng = np.random.default_rng(2)
    few = unit(rng, 4, 32).astype(np.float16)
    xb = few[rng.integers(4, size=1000)]
    xq = np.concatenate([unit(rng, 3, 32), few.astype(np.float32)])
    assert_same(scan(xq, np.split(xb, 3 * [250] and [250, 500]), 40, block_rows=128), brute_force(xq, xb, 40))


def test_only_allowed_rows_are_found() -> None:
    rng = np.random.default_rng(3)
    xq, xb = unit(rng, 5, 24), unit(rng, 900, 24).astype(np.float16)
    allowed = rng.random(900) < 0.3
    allowed[300:600] = False
    found = scan(xq, np.split(xb, [300, 600]), 20, allowed=np.split(allowed, [300, 600]), block_rows=64)
    assert_same(found, brute_force(xq, xb, 20, allowed))


def test_fewer_rows_than_k_are_padded() -> None:
    D, I = scan(np.ones((2, 3), np.float32), [np.zeros((0, 3), np.float16), np.ones((2, 3), np.float16)], 4)  # noqa: E741
    np.testing.assert_array_equal(I, [[0, 1, -1, -1]] * 2)
    np.testing.assert_array_equal(D, [[3, 3, -np.inf, -np.inf]] * 2)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int, np.ndarray, list[int]]:
    """Vectors of any scale and sign, many of them equal or opposite, in shards and blocks of any size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    d, n, q = draw(st.integers(1, 40)), draw(st.integers(1, 120)), draw(st.integers(1, 4))
    scale = draw(st.sampled_from([1e-4, 1.0, 50.0]))
    base = rng.standard_normal((draw(st.integers(1, n)), d)) * scale
    xb = (base[rng.integers(len(base), size=n)] * rng.choice([1, -1], size=(n, 1))).astype(np.float16)
    xq = (rng.standard_normal((q, d)) * scale).astype(np.float32)
    if draw(st.booleans()):
        xq, xb = np.abs(xq), -np.abs(xb)
    allowed = rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    return xq, xb, draw(st.integers(1, 2 * n)), draw(st.integers(n // 6 + 1, 150)), allowed, cuts


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(DTYPES))
def test_law_equals_brute_force(
    case: tuple[np.ndarray, np.ndarray, int, int, np.ndarray, list[int]], dtype: torch.dtype
) -> None:
    xq, xb, k, block_rows, allowed, cuts = case
    found = scan(xq, np.split(xb, cuts), k, allowed=np.split(allowed, cuts), block_rows=block_rows, product_dtype=dtype)
    expected = brute_force(xq, xb, k, allowed)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_more_queries_than_one_product_takes_and_progress() -> None:
    rng = np.random.default_rng(4)
    xq, xb = unit(rng, 1500, 16), unit(rng, 400, 16).astype(np.float16)
    passed: list[int] = []
    assert_same(scan(xq, [xb[:250], xb[250:]], 5, block_rows=100, progress=passed.append), brute_force(xq, xb, 5))
    assert passed == [100, 200, 250, 350, 400]


def test_a_memory_mapped_shard_is_read_in_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    xq, xb = unit(rng, 3, 16), unit(rng, 200, 16).astype(np.float16)
    path = tmp_path / "img_emb_0000.npy"
    np.save(path, xb)
    assert_same(scan(xq, [np.load(path, mmap_mode="r")], 10), brute_force(xq, xb, 10))


def test_pair_scores_are_those_of_scan() -> None:
    rng = np.random.default_rng(6)
    xq, xb = unit(rng, 4, 100), unit(rng, 500, 100).astype(np.float16)
    D, I = scan(xq, [xb], 300)  # noqa: E741
    query = np.repeat(np.arange(4), 300)
    np.testing.assert_array_equal(pair_scores(xq, xb, query, I.ravel()).reshape(4, 300), D)


def test_inputs_that_do_not_fit_are_refused() -> None:
    xq, xb = np.ones((1, 4), np.float32), np.ones((3, 4), np.float16)
    with pytest.raises(ValueError, match="k is at least 1"):
        scan(xq, [xb], 0)
    with pytest.raises(ValueError, match="float16 like the queries"):
        scan(xq, [xb.astype(np.float32)], 1)
    with pytest.raises(ValueError, match="not finite"):
        scan(xq, [np.full((3, 4), np.nan, np.float16)], 1)
    with pytest.raises(ValueError, match="not finite"):
        scan(np.full((1, 4), np.inf), [xb], 1)
    with pytest.raises(ValueError, match="mask"):
        scan(xq, [xb], 1, allowed=[np.ones(2, bool)])
