"""Shifted test sets of the pocket tasks: the tasks are their own otherwise, and a shift may show some classes."""

from __future__ import annotations

import numpy as np
import pytest

from retrieve_or_generate.pocket.shifted import SHIFTED
from retrieve_or_generate.tasks import load_task


@pytest.mark.parametrize("name", SHIFTED)
def test_what_it_extends_is_as_it_was(name: str) -> None:
    task, plain = load_task(name), load_task(SHIFTED[name].of)
    assert task.name == name
    assert (task.class_names, task.templates, task.synonyms) == (plain.class_names, plain.templates, plain.synonyms)
    assert task.fingerprint == plain.fingerprint
    assert list(task.shifts) == [SHIFTED[name].name]


def test_classes_are_those_that_were_drawn() -> None:
    small, plain = load_task("digits-shifted").shift("small"), load_task("digits").split("test")
    assert (small.labels == plain.labels).all()
    counts = np.bincount(load_task("aircraft-shifted").shift("turned").labels, minlength=12)
    assert counts.tolist() == [40] * 8 + [0] * 4
    assert np.bincount(load_task("textures-shifted").shift("faint").labels).tolist() == [40] * 8
