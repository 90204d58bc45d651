"""What the pocket language model is taught, and that a step of its training teaches something."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from retrieve_or_generate.in_context import ARROW, EXAMPLES, INSTRUCTION, read_lists
from retrieve_or_generate.pocket.captions import VOCABULARIES
from retrieve_or_generate.pocket.train_language import (
    MOST_TOKENS,
    Texts,
    Trainer,
    caption_of,
    colour_of,
    make_tokenizer,
)


def test_texts_have_the_form_of_use_and_captions_name_what_is_asked_for() -> None:
    texts = Texts(read_lists(), np.random.default_rng(0))
    for _ in range(300):
        parts = texts.draw()
        lines = "".join(text for text, _ in parts).splitlines()
        assert lines[0] == INSTRUCTION
        assert len(lines) == EXAMPLES + 2
        assert parts[-1][1]
        for (before, _), (after, is_learned) in itertools.pairwise(parts):
            if is_learned:
                name = before.splitlines()[-1].removesuffix(ARROW).split(", ")[0]
                assert f" {name}" in after or after.startswith(name)
                assert after.endswith("\n")


def test_a_background_becomes_its_colour() -> None:
    assert [colour_of(place) for place in ("snow", "forest", "night sky", "deep water")] == [
        "white",
        "green",
        "black",
        "blue",
    ]
    assert colour_of("spaceship") is None
    rng = np.random.default_rng(0)
    said = Counter(caption_of("aircraft", "merlin 2", "background", "forest", rng) for _ in range(50))
    assert all("merlin 2" in caption and " green" in caption for caption in said)
    assert len(said) > 5


def test_every_class_can_be_spoken_of_in_many_ways() -> None:
    rng = np.random.default_rng(0)
    for task, words in VOCABULARIES.items():
        said = {caption_of(task, words.class_names[0], "object", "", rng) for _ in range(400)}
        assert len(said) > 60


def test_the_tokenizer_reads_any_text_and_begins_as_in_training() -> None:
    tokenizer = make_tokenizer(example.line for example in read_lists().examples["object"])
    ids = tokenizer("Überraschung 77\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Überraschung 77\n"


@pytest.mark.slow
def test_training_lowers_the_loss() -> None:
    threads = torch.get_num_threads()
    trainer = Trainer(steps=12, batch_size=4)
    ids, targets = trainer.batch()
    assert ids.shape == targets.shape
    assert ids.shape[1] <= MOST_TOKENS
    losses = [trainer.step() for _ in range(12)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    assert torch.get_num_threads() == threads
