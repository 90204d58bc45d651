from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.finetune.recipe import Descent, batches, plan
from retrieve_or_generate.settings import FinetuneSettings

TARGET = np.array([3.0, -2.0, 0.5])


def reference(updates: int, warmup: int, peak: float, decay: float) -> np.ndarray:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on Σ (θ − target)⁴ from 0: warm-up, cosine, clipping to norm 1."""
    theta, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for t in range(1, updates + 1):
        share = t / warmup if t <= warmup else 0.5 + 0.5 * math.cos(math.pi * (t - 1 - warmup) / (updates - warmup))
        g = 4 * (theta - TARGET) ** 3
        g *= min(1, 1 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        theta = theta - share * peak * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * theta)
    return theta


@pytest.mark.parametrize(("updates", "fraction"), [(20, 0.1), (20, 0.0), (7, 0.5)])
def test_updates_are_those_of_a_few_lines_written_apart(updates: int, fraction: float) -> None:
    settings = FinetuneSettings(updates=updates, warmup_fraction=fraction, weight_decay=0.1)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    descent = Descent([([theta], 1.0)], plan(settings, 5), 0.2, settings.weight_decay)
    for _ in range(updates):
        descent.step([((theta - torch.from_numpy(TARGET)) ** 4).sum()])
    expected = reference(updates, round(fraction * updates), 0.2, 0.1)
    np.testing.assert_allclose(theta.detach().numpy(), expected, rtol=1e-6)


def test_a_group_has_its_factor_of_the_rate() -> None:
    slow, fast = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    descent = Descent([([slow], 1.0), ([fast], 10.0)], plan(FinetuneSettings(updates=5), 5), 1e-3, 0.0)
    descent.step([slow.sum(), fast.sum()])
    assert fast.item() == pytest.approx(10 * slow.item(), rel=1e-4)


def test_equal_updates_are_equal_at_every_scale_and_paper_follows_passes() -> None:
    assert {plan(FinetuneSettings(updates=70), n).updates for n in (1, 50, 10_000)} == {70}
    paper = FinetuneSettings(recipe="paper", batch_size=512)
    assert [plan(paper, n).updates for n in (1_000, 10_000, 15_000, 139_000)] == [60, 600, 900, 8_160]
    small = plan(paper, 1_000)  # never leaves the warm-up of 500, as published
    assert small.warmup_updates == 500
    assert small.rate(59) == 60 / 500


def test_no_images_means_no_update_and_one_look() -> None:
    for settings in (FinetuneSettings(), FinetuneSettings(recipe="paper"), FinetuneSettings(updates=0)):
        nothing = plan(settings, 0)
        assert (nothing.updates, nothing.looks) == (0, (0,))


@given(st.integers(1, 300), st.integers(1, 20), st.floats(0, 0.99))
def test_rates_rise_to_the_peak_then_fall_and_the_last_look_is_at_the_end(
    updates: int, evaluations: int, fraction: float
) -> None:
    made = plan(FinetuneSettings(updates=updates, evaluations=evaluations, warmup_fraction=fraction), 10)
    rates = [made.rate(update) for update in range(updates)]
    peak = made.warmup_updates
    assert all(0 < rate <= 1 for rate in rates)
    assert sorted(rates[:peak]) == rates[:peak]
    assert sorted(rates[peak:], reverse=True) == rates[peak:]
    assert made.looks[-1] == updates
    assert len(made.looks) == min(evaluations, updates)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 100))
def test_every_image_comes_once_before_any_comes_again(images: int, batch_size: int, seed: int) -> None:
    settings = FinetuneSettings(batch_size=batch_size)
    drawn = list(itertools.islice(batches(settings, images, seed), 12))
    assert all(len(rows) == batch_size for rows in drawn)
    order = np.concatenate(drawn)
    for start in range(0, len(order) - images + 1, images):
        assert sorted(order[start : start + images]) == list(range(images))
    again = np.concatenate(list(itertools.islice(batches(settings, images, seed), 12)))
    np.testing.assert_array_equal(order, again)


def test_passes_of_the_paper_end_in_a_smaller_batch() -> None:
    settings = FinetuneSettings(recipe="paper", batch_size=8)
    drawn = list(itertools.islice(batches(settings, 20, seed=0), 6))
    assert [len(rows) for rows in drawn] == [8, 8, 4, 8, 8, 4]
    assert sorted(np.concatenate(drawn[:3])) == list(range(20))
