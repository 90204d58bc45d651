"""Quotas are the same for all sources and nested over scales; ranks count each class from zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate.balance import class_quotas, seeded_ranks, short_classes, within_cap
from retrieve_or_generate.errors import UsageError

NAMES = ("one", "two", "three", "four")
by_class = st.lists(st.integers(0, 9), min_size=4, max_size=4).map(np.array)
sources = st.dictionaries(st.sampled_from(["retrieved", "synthetic", "perturbed"]), by_class, min_size=1)


@settings(max_examples=50, deadline=None)
@given(sources, st.data())
def test_quotas_fill_the_scale_evenly_within_what_all_have(counts: dict[str, np.ndarray], data: st.DataObject) -> None:
    available = np.min(list(counts.values()), axis=0)
    scale = data.draw(st.integers(0, int(available.sum())))
    quotas = class_quotas(counts, scale, NAMES)
    assert quotas.sum() == scale
    assert (quotas <= available).all()
    assert (quotas[quotas < available] >= quotas.max() - 1).all()
    assert np.array_equal(quotas, class_quotas(dict(reversed(counts.items())), scale, NAMES))
    smaller = class_quotas(counts, data.draw(st.integers(0, scale)), NAMES)
    assert (smaller <= quotas).all()


def test_quotas_by_hand() -> None:
    counts = {"retrieved": np.array([9, 2, 9, 9]), "synthetic": np.array([9, 9, 4, 9])}
    assert class_quotas(counts, 10, NAMES).tolist() == [3, 2, 3, 2]
    assert class_quotas(counts, 24, NAMES).tolist() == [9, 2, 4, 9]


def test_too_large_a_scale_names_the_class_and_the_source() -> None:
    counts = {"retrieved": np.array([9, 5, 9, 9]), "synthetic": np.array([9, 9, 1, 9])}
    with pytest.raises(UsageError, match=r"scale 25: .* share only 24 images \(fewest of 'three': 1 in synthetic"):
        class_quotas(counts, 25, NAMES)


def test_a_class_that_one_source_leaves_out_is_left_out_of_all() -> None:
    counts = {"retrieved": np.array([9, 0, 9, 9]), "synthetic": np.array([9, 9, 4, 9])}
    assert class_quotas(counts, 10, NAMES, {"two"}).tolist() == [4, 0, 3, 3]
    assert class_quotas({"synthetic": counts["synthetic"]}, 10, NAMES, {"two"}).tolist() == [4, 0, 3, 3]
    with pytest.raises(UsageError, match=r"only 22 images \(fewest of 'three': 4 in synthetic; left out: two\)"):
        class_quotas(counts, 23, NAMES, {"two"})


def test_a_class_is_short_below_the_floor_even_without_images() -> None:
    labels = np.array([0, 0, 2, 2, 2])
    assert short_classes(labels, 4, 1).tolist() == [1, 3]
    assert short_classes(labels, 4, 3).tolist() == [0, 1, 3]
    assert short_classes(labels, 4, 0).tolist() == []
    assert short_classes(labels[:0], 2, 1).tolist() == [0, 1]


def test_the_cap_keeps_the_best() -> None:
    scores, labels = np.array([0.1, 0.3, 0.2, 0.9]), np.array([0, 0, 0, 1])
    assert within_cap(scores, labels, np.array(list("abcd")), 2).tolist() == [False, True, True, True]


keyed = st.dictionaries(st.text("abcdef0123", min_size=1, max_size=6), st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(keyed, st.randoms())
def test_ranks_count_from_zero_and_keep_their_order_when_images_go(drawn: dict[str, int], random: object) -> None:
    keys, labels = np.array(list(drawn)), np.array(list(drawn.values()))
    ranks = seeded_ranks("digits", labels, keys)
    for label in set(drawn.values()):
        assert sorted(ranks[labels == label]) == list(range((labels == label).sum()))
    some = sorted(random.sample(range(len(keys)), (len(keys) + 1) // 2))  # type: ignore[attr-defined]
    fewer = seeded_ranks("digits", labels[some], keys[some])
    for label in set(labels[some].tolist()):
        mine = labels[some] == label
        assert np.array_equal(np.argsort(fewer[mine]), np.argsort(ranks[some][mine]))


def test_ranks_are_no_order_of_keys() -> None:
    keys = np.array([f"{i:03d}" for i in range(100)])
    ranks = seeded_ranks("digits", np.zeros(100, np.int64), keys)
    assert abs(np.corrcoef(ranks, np.arange(100))[0, 1]) < 0.3
    assert not np.array_equal(ranks, seeded_ranks("textures", np.zeros(100, np.int64), keys))
