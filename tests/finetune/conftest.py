from __future__ import annotations

from collections.abc import Iterator

import pytest
from colours import coloured, make_clip
from kinds import words_read_once

from retrieve_or_generate.finetune import LabelledImages, TaskImages
from retrieve_or_generate.models import Clip


@pytest.fixture(scope="session")
def clip() -> Clip:
    return make_clip()


@pytest.fixture(scope="session")
def task(clip: Clip) -> TaskImages:
    weights = clip.class_weights(["red", "green", "blue"], ["a {}", "some {} thing"])
    return TaskImages(weights, coloured(24, seed=1), coloured(18, seed=2), coloured(21, seed=3))


@pytest.fixture(scope="session")
def train() -> LabelledImages:
    return coloured(20, seed=4)


@pytest.fixture(autouse=True, scope="session")
def _words() -> Iterator[None]:
    with words_read_once():
        yield
