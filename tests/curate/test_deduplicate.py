"""Of every picture one copy stays: the best, and always the same one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate import near, thumbnail
from retrieve_or_generate.curate.deduplicate import duplicates
from retrieve_or_generate.curate.described import Described
from retrieve_or_generate.curate.descriptor import Descriptor, find_descriptor
from retrieve_or_generate.curate.perceptual import describe as hashes_of
from retrieve_or_generate.settings import CurateSettings

ROWS = 8
pair = st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)).filter(lambda ends: ends[0] != ends[1])
graphs = st.lists(pair, max_size=14)
scores_with_ties = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS).map(lambda drawn: np.array(drawn) / 3)
KEYS = np.array([f"k{i}" for i in range(ROWS)])
DIFFERENT = np.array([f"h{i}" for i in range(ROWS)])


def _comparing(pairs: list[tuple[int, int]]) -> object:
    """Rows are copies where a pair says so."""
    linked = np.zeros((ROWS, ROWS), bool)
    for i, j in pairs:
        linked[i, j] = linked[j, i] = True

    def comparing(rows: np.ndarray) -> list[near.Comparison]:
        every = np.ones((len(rows), 1), np.float32)
        return [near.Comparison(every, every, 0.5, lambda i, j: linked[rows[i], rows[j]])]

    return comparing


def _goes(pairs: list[tuple[int, int]], scores: np.ndarray, keys: np.ndarray = KEYS, block: int = 3) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "_BLOCK", block)
        return duplicates(DIFFERENT[: len(keys)], scores, keys, _comparing(pairs))  # type: ignore[arg-type]


def _rank(scores: np.ndarray, row: int) -> tuple[float, str]:
    return (-scores[row], KEYS[row])


@settings(max_examples=50, deadline=None)
@given(graphs, scores_with_ties, st.integers(1, ROWS))
def test_one_of_each_pair_goes_and_what_goes_has_a_better_copy(
    pairs: list[tuple[int, int]], scores: np.ndarray, block: int
) -> None:
    goes = _goes(pairs, scores, block=block)
    for i, j in pairs:
        assert goes[i] or goes[j]
    for row in np.flatnonzero(goes):
        partners = [a + b - row for a, b in pairs if row in (a, b)]
        assert any(not goes[other] and _rank(scores, other) < _rank(scores, row) for other in partners)


@settings(max_examples=50, deadline=None)
@given(graphs, scores_with_ties, st.permutations(range(ROWS)))
def test_the_order_of_rows_changes_nothing(pairs: list[tuple[int, int]], scores: np.ndarray, order: list[int]) -> None:
    place = np.argsort(order)
    moved = _goes([(int(place[i]), int(place[j])) for i, j in pairs], scores[order], KEYS[order])
    assert np.array_equal(moved[place], _goes(pairs, scores))


def test_a_chain_keeps_both_ends() -> None:
    goes = _goes([(0, 1), (2, 1)], np.array([0.9, 0.8, 0.7]), KEYS[:3])
    assert goes.tolist() == [False, True, False]


_PICTURES = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8)).repeat(4, 2).repeat(4, 3).astype(np.uint8)
THUMBNAIL = find_descriptor(CurateSettings())


def _described(pixels: np.ndarray, features: np.ndarray, scores: np.ndarray, sha256: list[str]) -> Described:
    n = len(pixels)
    keys = np.array([f"k{i}" for i in range(n)], dtype="<U3")
    descriptors, hashes = thumbnail.describe(pixels), hashes_of(pixels)
    return Described(
        keys, np.zeros(n, np.int64), np.array(sha256, dtype="<U4"), features, descriptors, hashes, np.array(scores)
    )


def _found(described: Described, descriptor: Descriptor = THUMBNAIL, **chosen: object) -> list[bool]:
    settings = CurateSettings.model_validate(chosen)
    return duplicates(
        described.sha256,
        described.scores,
        described.keys,
        lambda rows: described.comparisons(settings, descriptor, rows),
    ).tolist()


def test_near_copies_are_alike_in_both_ways() -> None:
    features = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 3]]  # the last row has an embedding unlike row 1's
    described = _described(_PICTURES[[0, 1, 2, 0, 1]], features, -np.arange(5.0), list("abcde"))
    assert _found(described) == [False, False, False, True, False]


def test_of_equal_bytes_the_best_stays_and_stands_for_all() -> None:
    shown = np.array([0, 0, 0, 1, 0])  # the last row shows the same in other bytes
    features = np.eye(4, dtype=np.float32)[shown]
    described = _described(_PICTURES[shown], features, np.array([0.1, 0.9, 0.9, 0.2, 0.8]), list("aaabc"))
    assert _found(described) == [True, False, True, False, True]


def test_a_perceptual_hash_finds_what_has_other_contrast_if_embeddings_agree() -> None:
    paler = (_PICTURES // 2 + 60).astype(np.uint8)
    pixels = np.concatenate([_PICTURES, paler])
    features = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 1, 3]]
    described = _described(pixels, features, -np.arange(6.0), list("abcdef"))
    assert _found(described) == [False] * 6
    assert _found(described, perceptual_hash_bits=4) == [False] * 3 + [True, True, False]
    assert _found(described, perceptual_hash_bits=4, duplicate_cosine=0.001) == [False] * 3 + [True, True, False]


def test_embeddings_alone_find_copies_when_asked_to() -> None:
    features = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    described = _described(_PICTURES, features, -np.arange(3.0), list("abc"))
    assert _found(described) == [False] * 3
    assert _found(described, semantic_cosine=0.79) == [False, True, False]
    assert _found(described, semantic_cosine=0.81) == [False] * 3
    assert _found(described, semantic_cosine=0.5) == [False, True, False]  # the last copies only what has gone


def test_what_a_learned_descriptor_finds_needs_no_second_opinion() -> None:
    features = np.eye(3, dtype=np.float32)
    described = _described(_PICTURES, features, -np.arange(3.0), list("abc"))
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    described = Described(**{**vars(described), "descriptors": vectors})
    learned = Descriptor("sscd", {}, Path("weights"), 0.75)
    assert _found(described, learned) == [False, True, False]


def test_nothing_has_no_copies() -> None:
    nothing = _described(_PICTURES[:0], np.zeros((0, 4), np.float32), np.zeros(0), [])
    assert _found(nothing, perceptual_hash_bits=3, semantic_cosine=0.9) == []


@pytest.mark.parametrize("bits", [None, 3])
def test_thousands_of_files_of_one_picture_are_one_picture(bits: int | None) -> None:
    shown = np.zeros(2400, np.int64)
    shown[[17, 2300]] = 1, 2
    features = np.eye(4, dtype=np.float32)[shown]
    sha256 = [f"{i:04x}" for i in range(len(shown))]
    described = _described(_PICTURES[shown], features, -np.arange(len(shown)), sha256)
    stays = np.flatnonzero(~np.array(_found(described, perceptual_hash_bits=bits)))
    assert stays.tolist() == [0, 17, 2300]
