"""The CLIP score and the share of each class that it keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate import score
from retrieve_or_generate.curate.score import best_template_scores, clip_scores, places, top_fraction

rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40)


def _columns(drawn: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, labels and keys."""
    labels, scores = np.array(drawn).T
    return scores / 4.0, labels, np.array([f"k{i:03d}" for i in range(len(drawn))])


def test_a_score_is_the_cosine_with_the_own_class() -> None:
    features = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    weights = np.array([[1, 0], [0, 1]], np.float32)
    assert np.allclose(clip_scores(features, weights, np.array([0, 0, 1])), [1, 0.6, 0.8])
    assert clip_scores(features[:0], weights, np.array([], np.int64)).shape == (0,)


def test_scoring_in_parts_is_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features, weights, labels = rng.normal(size=(50, 8)), rng.normal(size=(8, 4)), rng.integers(0, 4, 50)
    whole = clip_scores(features.astype(np.float32), weights.astype(np.float32), labels)
    monkeypatch.setattr(score, "_ROWS", 7)
    assert np.array_equal(clip_scores(features.astype(np.float32), weights.astype(np.float32), labels), whole)


def test_the_best_template_of_the_own_class_counts() -> None:
    templates = {0: np.array([[1, 0], [0, 1]], np.float32), 2: np.array([[0.6, 0.8]], np.float32)}
    features = np.array([[0.6, 0.8], [0.6, 0.8], [1, 0]], np.float32)
    found = best_template_scores(features, templates.__getitem__, np.array([0, 2, 0]))
    assert found.dtype == np.float32
    assert np.allclose(found, [0.8, 1, 1])
    assert best_template_scores(features[:0], templates.__getitem__, np.array([], np.int64)).shape == (0,)


def test_places_by_hand() -> None:
    scores, labels = np.array([0.1, 0.9, 0.5, 0.5, 0.7]), np.array([1, 1, 1, 1, 0])
    keys = np.array(["a", "b", "d", "c", "e"])
    assert places(scores, labels, keys).tolist() == [3, 0, 2, 1, 0]


@settings(max_examples=50, deadline=None)
@given(rows)
def test_places_count_from_zero_in_each_class(drawn: list[tuple[int, int]]) -> None:
    scores, labels, keys = _columns(drawn)
    found = places(scores, labels, keys)
    for label in set(labels.tolist()):
        assert sorted(found[labels == label]) == list(range((labels == label).sum()))


@settings(max_examples=50, deadline=None)
@given(rows, st.floats(0.001, 1), st.randoms())
def test_the_best_share_stays_in_any_order(drawn: list[tuple[int, int]], fraction: float, random: object) -> None:
    scores, labels, keys = _columns(drawn)
    keep = top_fraction(scores, labels, keys, fraction)
    for label in set(labels.tolist()):
        mine = labels == label
        assert keep[mine].sum() == math.ceil(round(fraction * mine.sum(), 9))
        if not keep[mine].all():
            assert scores[mine & keep].min() >= scores[mine & ~keep].max()
    order = list(range(len(drawn)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert np.array_equal(top_fraction(scores[order], labels[order], keys[order], fraction), keep[order])


def test_a_tenth_of_thirty_is_three() -> None:
    labels = np.zeros(30, np.int64)
    keys = np.array([f"{i:02d}" for i in range(30)])
    assert top_fraction(np.zeros(30), labels, keys, 0.1).sum() == 3
    assert top_fraction(np.zeros(30), labels, keys, 1.0).all()
    assert top_fraction(np.zeros(0), labels[:0], keys[:0], 0.3).shape == (0,)
