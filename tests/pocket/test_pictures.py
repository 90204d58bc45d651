"""The pocket pool has what makes LAION hard, in the shares that its page promises."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from retrieve_or_generate.pocket import captions
from retrieve_or_generate.pocket.pictures import POOL_ROWS, TASKS, decode, evaluation_split, pool_rows


def test_rows_and_distractors() -> None:
    rows = pool_rows()
    kinds = Counter(row.planted["kind"] for row in rows)
    assert len(rows) == POOL_ROWS
    assert kinds["distractor"] >= POOL_ROWS / 2
    assert kinds["exact_duplicate"] == kinds["near_duplicate"] == 200
    assert kinds["evaluation_copy"] == 48 * len(TASKS)


def test_classes_have_a_long_tail() -> None:
    for task in TASKS:
        counts = Counter(row.planted["class_name"] for row in pool_rows() if row.planted.get("task") == task)
        assert set(counts) == set(captions.VOCABULARIES[task].class_names)
        assert max(counts.values()) > 2.2 * min(counts.values())


def test_captions_are_as_careless_as_the_web() -> None:
    kinds = Counter(row.planted["caption_kind"] for row in pool_rows() if row.planted["kind"] == "class")
    total = sum(kinds.values())
    assert 0.6 < kinds["name"] / total < 0.72
    assert 0.2 < kinds["synonym"] / total < 0.28
    assert min(kinds["generic"], kinds["wrong_name"]) > 0
    for row in pool_rows()[:2000]:
        if row.planted["caption_kind"] == "name":
            assert row.planted["class_name"] in row.caption
        if row.planted["caption_kind"] == "synonym":
            assert not re.search(rf"\b{row.planted['class_name']}\b", row.caption)


def test_some_names_stand_inside_other_words_or_mean_something_else() -> None:
    names = [name for words in captions.VOCABULARIES.values() for name in words.class_names]
    inside = [row.caption for row in pool_rows() if row.planted["caption_kind"] == "inside_word"]
    assert any(name in caption and not re.search(rf"\b{name}\b", caption) for caption in inside for name in names)
    assert sum(row.planted["caption_kind"] == "other_sense" for row in pool_rows()) > 500


def test_planted_copies_are_what_they_say() -> None:
    rows = pool_rows()
    for row in rows:
        if row.planted["kind"] == "evaluation_copy":
            task, split, index = row.planted["of"].split("/")
            original = evaluation_split(task, split)[int(index)]
            assert (row.jpeg == original.jpeg) == row.planted["identical"]
            assert np.abs(decode(row.jpeg).astype(int) - decode(original.jpeg)).mean() < 12
        if row.planted["kind"] in ("exact_duplicate", "near_duplicate"):
            original_row = rows[int(row.planted["of"].removeprefix("pool/"))]
            assert (row.jpeg == original_row.jpeg) == (row.planted["kind"] == "exact_duplicate")


def test_tags_and_dead_links() -> None:
    rows = pool_rows()
    tags = Counter(row.nsfw for row in rows)
    assert min(tags["NSFW"], tags["UNSURE"], tags[""]) > 200
    assert tags["UNLIKELY"] > 0.9 * len(rows)
    assert 0.03 < sum(row.dead for row in rows) / len(rows) < 0.07


def test_evaluation_pictures_are_drawn_alike_every_time() -> None:
    first = [evaluation_split(task, "val")[5].jpeg for task in TASKS]
    evaluation_split.cache_clear()
    assert first == [evaluation_split(task, "val")[5].jpeg for task in TASKS]
