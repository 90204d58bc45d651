"""Sampling with numbers of one's own: the law of nucleus sampling, and sentences that do not depend on their neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from retrieve_or_generate.synthesize.prompts.naming import names_class
from retrieve_or_generate.synthesize.prompts.nucleus import Nucleus


def _chosen(scores: torch.Tensor, numbers: list[float], temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    made = Nucleus(np.array(numbers)[:, None], temperature, top_p)(torch.zeros(1, 1), scores)
    assert ((made == 0).sum(-1) == 1).all()
    return made.argmax(-1).tolist()


def test_a_case_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().expand(7, 4)
    numbers = [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91]
    assert _chosen(scores, numbers) == [1, 1, 2, 2, 3, 3, 0]
    # 0.4 + 0.3 is short of 0.75, with 0.2 it is not: three count, and hold 0.9
    assert _chosen(scores, numbers, top_p=0.75) == [1, 1, 1, 2, 2, 3, 3]
    assert _chosen(scores, numbers, top_p=0.4 - 1e-6) == [1] * 7


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 3), st.floats(0.05, 1))
def test_it_is_what_transformers_samples_from(seed: int, temperature: float, top_p: float) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(0, 2, (1, 12)))
    theirs = TopPLogitsWarper(top_p)(torch.zeros(1, 1), TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), scores))
    expected = theirs.softmax(-1)[0].numpy()
    n = 2000
    numbers = ((np.arange(n) + 0.5) / n).tolist()  # evenly spread, so shares are exact to 1 / n
    shares = np.bincount(_chosen(scores.expand(n, 12), numbers, temperature, top_p), minlength=12) / n
    np.testing.assert_allclose(shares, expected, atol=1.01 / n)


def test_each_row_has_its_own_number_for_each_token() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    nucleus = Nucleus(np.array([[0.1, 0.9], [0.9, 0.1]]), 1.0, 1.0)
    assert [nucleus(torch.zeros(1, 1), scores).argmax(-1).tolist() for _ in range(2)] == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("sentence", "name", "expected"),
    [
        ("A Zebra-Crossing, wet", "zebra crossing", True),
        ("two zebra  crossings", "zebra crossing", True),
        ("old foxes at night", "fox", True),
        ("stone wall", "one", False),
        ("seventeen", "seven", False),
        ("a falcon 200 aircraft", "falcon 20", False),
        ("a falcon 20, seen from above", "falcon 20", True),
        ("a C++ handbook", "c++", True),
        ("the tench_tinca fish", "tench tinca", True),
        ("", "fox", False),
    ],
)
def test_whether_a_sentence_names_a_class(sentence: str, name: str, expected: bool) -> None:
    assert names_class(sentence, name) is expected
