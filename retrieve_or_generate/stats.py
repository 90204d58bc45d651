"""The statistics of comparing two sources over seeds: numbers in, numbers out; numpy and scipy only.

Sources are paired by seed, so everything here works on differences of pairs. Samples are small (three to ten seeds): intervals
are Student's, never a percentile bootstrap (which covers 75 % at n = 3), deviations have ddof = 1, and nothing is said about
spread from a single value. Scores are refused when not finite: a failed trial must be dealt with before it comes here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

CONFIDENCE = 0.95
EXACT_PAIRS = 20  # 2^19 sign patterns, 4 MiB; beyond it the sign-flip test draws patterns instead of listing them
_DRAWN_PATTERNS = 1 << 16
_ROUNDING = 1e-12  # differences of scores in [0, 1] that vary by less than this do not vary


@dataclass(frozen=True)
class Summary:
    """Mean and sample deviation (ddof = 1; nan when n = 1) of n values."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Interval:
    """A mean paired difference with its confidence interval.

    `low`, `high` and `p_t` are nan when the pairs carry no claim: when n = 1, or when all differences are one value other
    than 0 (nothing to estimate a spread from). `p_sign_flip` is nan when n = 1.
    """

    mean: float
    low: float
    high: float
    n: int
    sd: float
    p_t: float
    p_sign_flip: float

    @property
    def claims(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low)

    @property
    def excludes_zero(self) -> bool:
        return self.claims and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Equivalence:
    """How many images of A do what a given number of B does.

    `images` is read from the mean curve; `low` and `high` are the least and the most over the n seeds. 0 stands for fewer than
    A's smallest scale, inf for more than its largest: a curve is never extended beyond its scales.
    """

    images: float
    low: float
    high: float
    n: int


def _finite(values: ArrayLike, ndim: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"expected a non-empty array of {ndim} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(array))} of {array.size} values are NaN or infinite")
    return array


def summarise(values: ArrayLike) -> Summary:
    """Mean, sample deviation and n of (n,) finite values."""
    array = _finite(values, 1)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Summary(float(array.mean()), sd, len(array))


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided p of (n,) paired differences under free choice of their signs, in (0, 1].

    Exact up to 20 pairs: the share of the 2^n sign patterns whose sum is at least as far from 0 as the sum seen, so never below
    2 / 2^n. Beyond 20 pairs, 65,536 patterns from a fixed generator, and (hits + 1) / (patterns + 1).
    """
    d = _finite(differences, 1)
    seen = abs(d.sum()) - _ROUNDING * np.abs(d).sum()
    if len(d) > EXACT_PAIRS:
        rng, hits = np.random.default_rng(len(d)), 0
        for _ in range(16):
            signs = rng.integers(0, 2, (_DRAWN_PATTERNS // 16, len(d)), dtype=np.int8) * 2 - 1
            hits += int(np.count_nonzero(np.abs(signs @ d) >= seen))
        return (hits + 1) / (_DRAWN_PATTERNS + 1)
    sums = d[:1]  # the first sign is fixed: flipping all signs changes no absolute sum
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= seen))


def least_sign_flip_p(n: int) -> float:
    """The smallest p that an exact two-sided sign-flip test of n pairs can give: 0.25 for three, below 0.05 from six on."""
    return 2.0 ** (1 - n)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean of a − b with Student's interval, for (n,) scores paired by position; `ValueError` unless finite and of one length."""
    first, second = _finite(a, 1), _finite(b, 1)
    if len(first) != len(second):
        raise ValueError(f"pairs need equal lengths, got {len(first)} and {len(second)}")
    d = first - second
    n, mean = len(d), float(d.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1, math.nan, math.nan, math.nan)
    sd = float(d.std(ddof=1))
    if sd <= _ROUNDING * max(1.0, float(np.abs(first).max()), float(np.abs(second).max())):
        return _without_spread(mean, n, sign_flip_p(d))
    error = sd / math.sqrt(n)
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * error
    p_t = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    return Interval(mean, mean - half, mean + half, n, sd, p_t, sign_flip_p(d))


def _without_spread(mean: float, n: int, p_sign_flip: float) -> Interval:
    if abs(mean) <= _ROUNDING:
        return Interval(0.0, 0.0, 0.0, n, 0.0, 1.0, 1.0)
    return Interval(mean, math.nan, math.nan, n, 0.0, math.nan, p_sign_flip)


def holm(p_values: ArrayLike) -> np.ndarray:
    """(m,) p-values adjusted by Holm's step-down procedure (Holm 1979), in the order given."""
    p = _finite(p_values, 1)
    if (p < 0).any() or (p > 1).any():
        raise ValueError("p-values lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def paired_t_power(effect: float, sd: float, n: int, confidence: float = CONFIDENCE) -> float:
    """Chance that a two-sided paired t test of n pairs shows a true difference `effect` >= 0, and shows it with its true sign.

    `sd` > 0 is the deviation of the differences. By the noncentral t distribution (Cohen 1988, section 2.5).
    """
    critical = special.stdtrit(n - 1, (1 + confidence) / 2)
    return 1.0 - float(special.nctdtr(n - 1, effect / sd * math.sqrt(n), critical))


def minimum_detectable_effect(sd: float, n: int, power: float = 0.8, confidence: float = CONFIDENCE) -> float:
    """The least true difference that n pairs with deviation `sd` of differences show with chance `power`; nan when n < 2."""
    if n < 2 or not math.isfinite(sd):
        return math.nan
    if sd == 0:
        return 0.0
    high = 4.0
    while paired_t_power(high, 1.0, n, confidence) < power:
        high *= 2
    return sd * float(optimize.brentq(lambda effect: paired_t_power(effect, 1.0, n, confidence) - power, 0.0, high))


def _images_needed(scales: np.ndarray, scores: np.ndarray, target: float) -> float:
    """The scale at which a curve, made rising and linear in log scale, reaches `target`; 0 or inf outside of its scales."""
    rising = optimize.isotonic_regression(scores).x
    if target < rising[0]:
        return 0.0
    if target > rising[-1]:
        return math.inf
    right = int(np.searchsorted(rising, target))  # the first scale that reaches it
    if right == 0:
        return float(scales[0])
    share = (target - rising[right - 1]) / (rising[right] - rising[right - 1])
    return float(scales[right - 1] * (scales[right] / scales[right - 1]) ** share)


def data_equivalence(scales: Sequence[int], scores: ArrayLike, target: ArrayLike) -> Equivalence:
    """How many images of A score as B does at one scale.

    `scales` (m,) strictly rising; `scores` (m, n) of A, one column a seed; `target` (n,) of B at the same seeds. A's curve is
    made monotone by isotonic regression and read linearly in log scale.
    """
    x, y, goal = _finite(scales, 1), _finite(scores, 2), _finite(target, 1)
    if y.shape != (len(x), len(goal)) or (np.diff(x) <= 0).any() or x[0] <= 0:
        raise ValueError(f"scales {x.shape} (rising), scores {y.shape} and target {goal.shape} do not fit")
    by_seed = [_images_needed(x, y[:, seed], goal[seed]) for seed in range(len(goal))]
    mean = _images_needed(x, y.mean(axis=1), float(goal.mean()))
    return Equivalence(mean, min(by_seed), max(by_seed), len(goal))
