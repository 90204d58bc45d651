import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from retrieve_or_generate import stats

scores = st.lists(st.floats(0, 1, allow_nan=False, width=32), min_size=2, max_size=8)


def test_summary_uses_the_sample_deviation() -> None:
    assert stats.summarise([1.0, 2.0, 3.0]) == stats.Summary(2.0, 1.0, 3)
    assert math.isnan(stats.summarise([0.5]).sd)


def test_paired_difference_worked_by_hand() -> None:
    """d = 1, 2, 3: mean 2, sd 1, error 1/√3, t(2) at 97.5 % = 4.302653."""
    interval = stats.paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (interval.mean, interval.sd, interval.n) == (2.0, 1.0, 3)
    assert interval.low == pytest.approx(2 - half)
    assert interval.high == pytest.approx(2 + half)
    assert interval.p_sign_flip == 0.25  # 2 of the 8 patterns: all as seen, all flipped
    assert interval.claims
    assert not interval.excludes_zero


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_paired_difference_agrees_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.7, 0.05, n), rng.normal(0.6, 0.05, n)
    theirs = scipy_stats.ttest_rel(a, b)
    ours = stats.paired_difference(a, b)
    expected = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert ours.p_t == pytest.approx(theirs.pvalue, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 6, 11])
def test_sign_flip_agrees_with_scipys_exact_permutations(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1, n)
    theirs = scipy_stats.permutation_test((d, np.zeros(n)), lambda a, b: np.mean(a - b), permutation_type="samples")
    assert stats.sign_flip_p(d) == pytest.approx(theirs.pvalue)


def test_sign_flip_with_ties_counts_every_pattern_that_reaches_the_sum() -> None:
    assert stats.sign_flip_p([1.0, 1.0, -1.0]) == 1.0  # |sum| = 1 is the least an odd number of ones can give
    assert stats.sign_flip_p([0.1, 0.2, 0.3]) == 0.25  # 0.1 + 0.2 is not 0.3 in binary
    assert stats.sign_flip_p([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(("n", "least"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_least_sign_flip_p_is_reached_when_all_signs_agree(n: int, least: float) -> None:
    assert stats.least_sign_flip_p(n) == least == stats.sign_flip_p(np.arange(1, n + 1))


def test_sign_flip_beyond_twenty_pairs_draws_patterns_and_is_near_the_t_test() -> None:
    d = np.random.default_rng(0).normal(0.35, 1, 40)
    p = stats.sign_flip_p(d)
    assert p == stats.sign_flip_p(d)
    assert p == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue, abs=0.01)
    assert stats.sign_flip_p(np.ones(40)) == pytest.approx(1 / 65537)


def test_one_pair_carries_no_claim() -> None:
    interval = stats.paired_difference([0.9], [0.5])
    assert interval.mean == pytest.approx(0.4)
    assert not interval.claims
    assert not interval.excludes_zero
    assert all(math.isnan(value) for value in (interval.sd, interval.p_t, interval.p_sign_flip))


def test_equal_arrays_differ_by_exactly_zero() -> None:
    interval = stats.paired_difference([0.3, 0.1, 0.7], [0.3, 0.1, 0.7])
    assert (interval.mean, interval.low, interval.high, interval.p_t, interval.p_sign_flip) == (0, 0, 0, 1, 1)
    assert not interval.excludes_zero


def test_a_constant_difference_has_no_interval() -> None:
    """Three equal differences would give an interval of width 0, the strongest of claims from nothing."""
    interval = stats.paired_difference([0.8, 0.9, 0.7], [0.7, 0.8, 0.6])
    assert interval.mean == pytest.approx(0.1)
    assert not interval.claims
    assert math.isnan(interval.p_t)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [], [[1.0, 2.0]], [1.0, 2.0, 3.0]])
def test_what_is_not_a_score_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"NaN or infinite|dimension|equal lengths"):
        stats.paired_difference(bad, [0.5, 0.6])


@given(scores, st.randoms())
def test_swapping_the_sources_mirrors_every_number(a: list[float], random: object) -> None:
    b = list(a)
    random.shuffle(b)  # type: ignore[attr-defined]
    one, other = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert one.mean == -other.mean
    assert one.p_sign_flip == other.p_sign_flip
    if one.claims:
        assert (one.low, one.high, one.p_t) == (-other.high, -other.low, other.p_t)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(3, size=shape)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(("draw", "low", "high"), [(normal, 0.94, 0.96), (heavy, 0.93, 0.975)])
def test_the_interval_covers_the_truth_in_95_of_100_studies(
    n: int, draw: Callable[..., np.ndarray], low: float, high: float
) -> None:
    studies = 0.3 + draw(np.random.default_rng(n), (2500, n))
    intervals = [stats.paired_difference(study, np.zeros(n)) for study in studies]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert low <= covered <= high


def test_holm_worked_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert stats.holm([0.2]).tolist() == [0.2]
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        stats.holm([1.5])
    with pytest.raises(ValueError, match="NaN"):
        stats.holm([0.1, math.nan])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
def test_holm_follows_a_permutation_and_lies_between_p_and_bonferroni(p: list[float], random: object) -> None:
    adjusted = stats.holm(p)
    assert np.all(adjusted >= p)
    assert np.all(adjusted <= np.minimum(1, np.array(p) * len(p)))
    order = list(range(len(p)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert stats.holm(np.array(p)[order]).tolist() == adjusted[order].tolist()


def test_family_wise_error_under_the_null_is_held_by_holm_and_only_by_it() -> None:
    """15 contrasts of five seeds with nothing to find, 4,000 times."""
    d = np.random.default_rng(15).normal(size=(4000, 15, 5))
    p = scipy_stats.ttest_1samp(d, 0, axis=2).pvalue
    uncorrected = np.mean(p.min(axis=1) < 0.05)
    held = np.mean([stats.holm(study).min() < 0.05 for study in p])
    assert uncorrected > 0.5
    assert 0.04 <= held <= 0.06


def test_power_and_detectable_effect_agree_with_tables_and_simulation() -> None:
    assert stats.minimum_detectable_effect(1.0, 10) == pytest.approx(0.9962, abs=1e-3)  # G*Power, two-sided, 80 %
    assert stats.minimum_detectable_effect(1.0, 34) == pytest.approx(0.4950, abs=1e-3)
    effect = stats.minimum_detectable_effect(2.0, 3)
    d = np.random.default_rng(3).normal(effect, 2.0, (20_000, 3))
    assert np.mean(scipy_stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


def test_detectable_effect_at_the_edges() -> None:
    assert math.isnan(stats.minimum_detectable_effect(0.1, 1))
    assert math.isnan(stats.minimum_detectable_effect(math.nan, 3))
    assert stats.minimum_detectable_effect(0.0, 3) == 0.0
    assert stats.minimum_detectable_effect(1.0, 2) == pytest.approx(2 * stats.minimum_detectable_effect(0.5, 2))


def test_equivalence_is_read_linearly_in_log_scale() -> None:
    """A rises by 0.1 each time its images double, so half a step is a factor of √2."""
    found = stats.data_equivalence([50, 100, 200], [[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]], [0.55, 0.65])
    assert found.images == pytest.approx(100)
    assert (found.low, found.high, found.n) == (pytest.approx(50 * math.sqrt(2)), pytest.approx(100 * math.sqrt(2)), 2)


def test_equivalence_never_leaves_the_scales_measured() -> None:
    curve = [[0.5], [0.6]]
    assert stats.data_equivalence([50, 100], curve, [0.9]) == stats.Equivalence(math.inf, math.inf, math.inf, 1)
    assert stats.data_equivalence([50, 100], curve, [0.1]) == stats.Equivalence(0, 0, 0, 1)
    straddling = stats.data_equivalence([50, 100], [[0.5, 0.5], [0.6, 0.6]], [0.1, 0.9])
    assert (straddling.images, straddling.low, straddling.high) == (50, 0, math.inf)
    assert stats.data_equivalence([50, 100], curve, [0.5]).images == 50
    assert stats.data_equivalence([50, 100], curve, [0.6]).images == pytest.approx(100)


def test_equivalence_pools_a_curve_that_falls() -> None:
    flat = stats.data_equivalence([50, 100, 200], [[0.6], [0.5], [0.9]], [0.55])
    assert flat.images == 50
    with pytest.raises(ValueError, match="do not fit"):
        stats.data_equivalence([100, 50], [[0.5], [0.6]], [0.55])


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), st.data())
def test_a_curve_reaches_its_own_values_within_its_scales(curve: list[float], data: st.DataObject) -> None:
    rising = sorted(curve)
    scales = [50 * 2**i for i in range(len(rising))]
    index = data.draw(st.integers(0, len(rising) - 1))
    found = stats.data_equivalence(scales, [[value] for value in rising], [rising[index]])
    assert scales[0] <= found.images <= scales[index] * (1 + 1e-9)
