from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.seeds import generator_for, seed_for

NAMES = st.text() | st.integers() | st.floats(allow_nan=False)


def test_seeds_are_the_same_on_every_machine_and_for_ever() -> None:
    assert seed_for("pocket", "synthesize", "digits", 3, 0) == 7762129220155397474
    assert generator_for("pocket", "order").integers(1 << 30) == 996233394


@given(st.lists(NAMES, max_size=4))
def test_a_seed_fits_every_library(names: list[str | int | float]) -> None:
    assert 0 <= seed_for("study", "purpose", *names) < 2**63


@given(st.lists(NAMES, max_size=3, unique_by=repr), NAMES)
def test_every_name_and_its_place_count(names: list[str | int | float], extra: str | int | float) -> None:
    seed = seed_for("study", "purpose", *names)
    assert seed != seed_for("study", "purpose", *names, extra)
    assert seed != seed_for("study", "other", *names)
    assert seed != seed_for("other", "purpose", *names)
    if len(names) > 1:
        assert seed != seed_for("study", "purpose", *reversed(names))


def test_a_number_is_not_its_text() -> None:
    assert seed_for("s", "p", 1) != seed_for("s", "p", "1")
    assert seed_for("s", "p", "a", "b") != seed_for("s", "p", "ab")


def test_generators_of_different_names_are_independent() -> None:
    a = generator_for("s", "p", 0).normal(size=2000)
    b = generator_for("s", "p", 1).normal(size=2000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
