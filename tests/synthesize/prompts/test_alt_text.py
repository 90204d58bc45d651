"""Captions of the retrieved images as prompts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy
from retrieve_or_generate.synthesize.prompts.text import clean

SourceOf = Callable[..., PromptSource]


def test_captions_of_kept_images_in_rank_order_and_round_again(source_of: SourceOf) -> None:
    captions = {0: ["a\tstriped\x00 cat", "", "zebra\u202e\r\ncrossing"], 1: ["dots"], 2: ["dots"]}
    strategy = load_strategy(source_of(strategy="alt_text", captions=captions))
    assert strategy.uses_real_captions
    prompts = strategy.prompts(0, 5)
    assert [p.text for p in prompts] == ["a striped cat", "zebra crossing"] * 2 + ["a striped cat"]
    assert [p.origin["caption_of"] for p in prompts] == ["0-0", "0-2", "0-0", "0-2", "0-0"]
    assert strategy.prompts(1, 1)[0].text == "dots"
    assert strategy.record() == {
        "captions": 4,
        "without_caption": 1,
        "given": 6,
        "given_again": 3,
        "classes_given_again": 1,
    }


def test_a_class_without_any_caption_is_named_when_it_is_needed(source_of: SourceOf) -> None:
    strategy = load_strategy(source_of(strategy="alt_text", captions={0: ["stripes"], 1: ["", "\x07"]}))
    assert strategy.prompts(1, 0) == []
    with pytest.raises(UsageError, match=r"none of its 2 images of 'dotted' has a caption; choose another"):
        strategy.prompts(1, 1)


@given(st.text())
def test_cleaning_twice_is_cleaning_once_and_leaves_one_line(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert len(clean(text).splitlines()) <= 1
    assert not any(unicodedata.category(letter) in ("Cc", "Cf") for letter in clean(text))


def test_what_can_be_seen_stays() -> None:
    assert clean("Café №\xa05 – 日本 🎌 e\u0301\ue000") == "Café № 5 – 日本 🎌 e\u0301\ue000"
