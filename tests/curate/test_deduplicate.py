"""Of every picture one copy stays: the best, and always the same one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate.deduplicate import duplicates, near_pairs, surplus
from retrieve_or_generate.curate.descriptor import describe

ROWS = 8
pair = st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)).filter(lambda ends: ends[0] != ends[1])
graphs = st.lists(pair, max_size=14).map(lambda pairs: np.array(pairs, np.int64).reshape(-1, 2))
scores_with_ties = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS).map(lambda drawn: np.array(drawn) / 3)
KEYS = np.array([f"k{i}" for i in range(ROWS)])


def _rank(scores: np.ndarray, row: int) -> tuple[float, str]:
    return (-scores[row], KEYS[row])


@settings(max_examples=50, deadline=None)
@given(graphs, scores_with_ties)
def test_one_of_each_pair_goes_and_what_goes_has_a_better_copy(pairs: np.ndarray, scores: np.ndarray) -> None:
    goes = surplus(pairs, scores, KEYS)
    for i, j in pairs:
        assert goes[i] or goes[j]
    for row in np.flatnonzero(goes):
        partners = [int(a + b - row) for a, b in pairs if row in (a, b)]
        assert any(not goes[other] and _rank(scores, other) < _rank(scores, row) for other in partners)


@settings(max_examples=50, deadline=None)
@given(graphs, scores_with_ties, st.permutations(range(ROWS)))
def test_the_order_of_rows_changes_nothing(pairs: np.ndarray, scores: np.ndarray, order: list[int]) -> None:
    place = np.argsort(order)
    moved = surplus(place[pairs], scores[order], KEYS[order])
    assert np.array_equal(moved[place], surplus(pairs, scores, KEYS))


def test_a_chain_keeps_both_ends() -> None:
    goes = surplus(np.array([[0, 1], [2, 1]]), np.array([0.9, 0.8, 0.7]), KEYS[:3])
    assert goes.tolist() == [False, True, False]


_PICTURES = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8)).repeat(4, 2).repeat(4, 3).astype(np.uint8)


def test_near_copies_are_alike_in_both_ways() -> None:
    features = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 3]]  # the last row has an embedding unlike row 1's
    pairs = near_pairs(features, describe(_PICTURES[[0, 1, 2, 0, 1]]), cosine=0.98)
    assert pairs.tolist() == [[0, 3]]


def test_of_equal_bytes_the_best_stays_and_stands_for_all() -> None:
    shown = np.array([0, 0, 0, 1, 0])  # the last row shows the same in other bytes
    sha256 = np.array(["a", "a", "a", "b", "c"])
    features, thumbnails = np.eye(4, dtype=np.float32)[shown], describe(_PICTURES[shown])
    scores = np.array([0.1, 0.9, 0.9, 0.2, 0.8])
    goes = duplicates(sha256, features, thumbnails, scores, np.array(["e", "d", "c", "b", "a"]), 0.98)
    assert goes.tolist() == [True, True, False, False, True]


def test_nothing_has_no_copies() -> None:
    keys, nothing = np.array([], dtype="<U1"), describe(np.zeros((0, 3, 32, 32), np.uint8))
    assert duplicates(keys, np.zeros((0, 4), np.float32), nothing, np.zeros(0), keys, 0.98).shape == (0,)
