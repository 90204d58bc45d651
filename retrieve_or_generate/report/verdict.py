"""The verdict: what the seeds of a run carry, in numbers and in words, and not more.

One contrast per task is primary, named by the experiment before any result is seen: retrieved − synthetic unless it says
otherwise, linear-probe accuracy on test, largest scale. Only these can make a claim, after Holm's correction over the tasks. All
other contrasts are exploratory: they have the same intervals, uncorrected, and claim nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from retrieve_or_generate import stats
from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.report.escaping import visible
from retrieve_or_generate.report.tables import METRICS, cells, in_order, test_scores

PRIMARY_METRIC = "linear_probe_accuracy"
ALPHA = 1 - stats.CONFIDENCE
POCKET_CAVEAT = "Pocket numbers say nothing about LAION-2B."

_NUMBER_WORDS = [
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
Scores = dict[tuple[str, str, int], pd.Series]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Contrast:
    """a − b over the seeds that both have, in the metric's own unit (1 point is 0.01)."""

    task: str
    scale: int
    metric: str
    a: str
    b: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    interval: stats.Interval
    primary: bool
    p_holm: float = math.nan
    family: int = 0

    @property
    def status(self) -> str:
        """`difference` (a claim), `lead` (the interval excludes 0, no claim), `no_difference_shown` or `no_claim`."""
        if not self.interval.claims:
            return "no_claim"
        if not self.interval.excludes_zero:
            return "no_difference_shown"
        return "difference" if self.primary and self.p_holm < ALPHA else "lead"

    @property
    def ahead(self) -> str:
        """The source with the higher mean, whatever that is worth."""
        return self.a if self.interval.mean >= 0 else self.b

    def sentence(self) -> str:
        a, b, task = visible(self.a), visible(self.b), visible(self.task)
        size = f"{abs(self.interval.mean) * 100:.1f} points of {METRICS[self.metric]} at n = {self.scale:,}"
        seeds = f"{count_of('seed', self.interval.n)}"
        if self.status == "no_claim":
            return self._no_claim(f"{a} - {b} = {self.interval.mean * 100:.1f} {size.split(' ', 1)[1]}")
        sign = 1 if self.ahead == self.a else -1
        low, high = sorted((sign * self.interval.low * 100, sign * self.interval.high * 100))
        spread = f"95 % interval [{_points(low)}, {_points(high)}], {seeds}"
        if self.status == "no_difference_shown":
            where = f"{size} in favour of {visible(self.ahead)}" if self.interval.mean else size
            return f"no difference shown between {a} and {b} on {task}: {where}, {spread}."
        winner, loser = (a, b) if self.ahead == self.a else (b, a)
        if self.status == "difference":
            return f"{winner} beats {loser} on {task} by {size}, {spread}."
        why = (
            f"p = {self.p_holm:.2g} after Holm's correction over {self.family} tasks" if self.primary else "exploratory"
        )
        return f"{winner} is ahead of {loser} on {task} by {size}, {spread}; {why}: no claim."

    def _no_claim(self, observed: str) -> str:
        task = visible(self.task)
        if self.interval.n == 1:
            return f"no claim on {task}: one seed has no interval ({observed})."
        seeds = count_of("seed", self.interval.n)
        return f"no claim on {task}: {seeds} gave the same difference, so nothing tells its uncertainty ({observed})."

    def record(self) -> dict[str, Any]:
        """The contrast as plain values for `verdict.json`."""
        interval = self.interval
        named = ("task", "scale", "metric", "a", "b", "primary", "status")
        numbers = ("mean", "low", "high", "n", "sd", "p_t", "p_sign_flip")
        return {
            **{name: getattr(self, name) for name in named},
            **{name: getattr(interval, name) for name in numbers},
            "p_holm": self.p_holm,
            "winner": self.ahead if self.status == "difference" else None,
            "minimum_detectable_effect": stats.minimum_detectable_effect(interval.sd, interval.n),
            "seeds": list(self.seeds),
            "differences": list(self.differences),
            "sentence": self.sentence(),
        }


def count_of(noun: str, number: int) -> str:
    """`three seeds`, `one seed`, `20 seeds`."""
    word = _NUMBER_WORDS[number] if number < len(_NUMBER_WORDS) else str(number)
    return f"{word} {noun}" + ("" if number == 1 else "s")


def _points(value: float) -> str:
    return f"{value + 0.0:.1f}".replace("-0.0", "0.0")


def _contrast(scores: Scores, task: str, scale: int, metric: str, a: str, b: str, primary: bool) -> Contrast | None:
    """a − b at one scale, paired by seed; None where no seed has both. The off-the-shelf model stands at scale 0."""
    first = scores.get((task, a, scale))
    second = scores.get((task, b, 0 if b == "none" else scale))
    if first is None or second is None:
        return None
    if b == "none" and len(second) == 1:  # a model that was not trained has no seed of its own
        second = pd.Series(second.iloc[0], index=first.index)
    pairs = pd.concat([first, second], axis=1, join="inner").sort_index()
    if pairs.empty:
        return None
    if not np.isfinite(pairs.to_numpy()).all():
        raise IntegrityError(
            f"results.parquet: {metric} of {task} at n = {scale} is NaN for {a} or {b}; rerun its trials"
        )
    x, y = pairs.to_numpy().T
    interval = stats.paired_difference(x, y)
    seeds = tuple(int(seed) for seed in pairs.index)
    return Contrast(task, scale, metric, a, b, seeds, tuple((x - y).tolist()), interval, primary)


def _contrasts(results: pd.DataFrame, tasks: Sequence[str], pair: Pair) -> list[Contrast]:
    found = []
    for metric in METRICS:
        scores = test_scores(results, metric)
        for task in tasks:
            scales = sorted({scale for name, _, scale in scores if name == task and scale > 0})
            sources = in_order(source for name, source, _ in scores if name == task)
            for scale in scales:
                for a, b in combinations(sources, 2):
                    primary = metric == PRIMARY_METRIC and (a, b) == pair and scale == scales[-1]
                    contrast = _contrast(scores, task, scale, metric, a, b, primary)
                    if contrast:
                        found.append(contrast)
    return _corrected(found)


def _corrected(contrasts: list[Contrast]) -> list[Contrast]:
    """Holm over the primary contrasts; one without a p-value counts as p = 1, so that it does not make the family smaller."""
    family = [index for index, contrast in enumerate(contrasts) if contrast.primary]
    if not family:
        return contrasts
    p_values = [contrasts[index].interval.p_t for index in family]
    adjusted = stats.holm([1.0 if math.isnan(p) else p for p in p_values])
    for index, p, p_holm in zip(family, p_values, adjusted, strict=True):
        p_holm = math.nan if math.isnan(p) else float(p_holm)
        contrasts[index] = replace(contrasts[index], p_holm=p_holm, family=len(family))
    return contrasts


def _equivalences(results: pd.DataFrame, tasks: Sequence[str], pair: Pair) -> list[dict[str, Any]]:
    """For both directions of the primary pair: how many images of one do what the largest scale of the other does.

    None where the scale is not the number of images: a mixture by count has more, the model off the shelf has seen none.
    """
    drawn = results[results["source"].isin(pair) & (results["scale"] > 0)]
    if (drawn["n_train"] != drawn["scale"]).any():
        return []
    scores = test_scores(drawn, PRIMARY_METRIC)
    found = []
    for task in tasks:
        for a, b in (pair, pair[::-1]):
            scales = sorted(scale for name, source, scale in scores if (name, source) == (task, a))
            goals = [scale for name, source, scale in scores if (name, source) == (task, b)]
            if not scales or not goals or len({*scales, *goals}) < 2:  # no curve to read from
                continue
            columns = [scores[task, a, scale] for scale in scales] + [scores[task, b, max(goals)]]
            paired = pd.concat(columns, axis=1, join="inner").dropna().to_numpy().T  # (scales + 1, seeds)
            if paired.shape[1]:
                same = stats.data_equivalence(scales, paired[:-1], paired[-1])
                row = {"task": task, "metric": PRIMARY_METRIC, "a": a, "b": b, "scale_b": max(goals), "n": same.n}
                row |= {"images": same.images, "low": same.low, "high": same.high, "scales_a": scales}
                found.append(row | {"sentence": _equivalence_sentence(row)})
    return found


def _equivalence_sentence(row: dict[str, Any]) -> str:
    least, most = row["scales_a"][0], row["scales_a"][-1]
    number = {0.0: f"fewer than {least:,}", math.inf: f"more than {most:,}"}
    images, low, high = (number.get(row[name], f"{row[name]:,.0f}") for name in ("images", "low", "high"))
    about = images if row["images"] in number else f"about {images}"
    seeds = low if low == high else f"{low} to {high}"
    a, b, task = (visible(row[name]) for name in ("a", "b", "task"))
    return (
        f"it takes {about} {a} images to reach on {task} what {row['scale_b']:,} {b} images reach (by seed: {seeds})."
    )


def _caveats(contrasts: Sequence[Contrast], pocket: bool, missing: Sequence[str]) -> list[str]:
    caveats = []
    n = min((contrast.interval.n for contrast in contrasts if contrast.primary), default=0)
    least = stats.least_sign_flip_p(n) if n else 0.0
    if n == 1:
        caveats.append("One seed carries no claim: run with --seeds 3 or more.")
    elif least >= ALPHA:
        caveats.append(
            f"{count_of('seed', n).capitalize()} can never reach p < 0.05 by an exact sign-flip test (least possible: "
            f"p = {least:.3g}); the intervals rest on Student's t, which takes the differences as normal."
        )
    if missing:
        more = f", and {len(missing) - 3} more" if len(missing) > 3 else ""
        named = visible("; ".join(missing[:3]))
        caveats.append(f"This run is incomplete: {count_of('trial', len(missing))} missing ({named}{more}).")
    return [*caveats, POCKET_CAVEAT] if pocket else caveats


def _plain(value: Any) -> Any:
    """NaN and infinity to None, so that the JSON is valid."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ordered(pair: Pair) -> Pair:
    """As the two are subtracted."""
    a, b = in_order(pair)
    return a, b


def _headline(contrasts: Sequence[Contrast], task: str, pair: Pair) -> dict[str, Any]:
    primary = next((contrast for contrast in contrasts if contrast.primary and contrast.task == task), None)
    if primary is None:
        a, b = map(visible, pair)
        sentence = f"no claim on {visible(task)}: no seed has both {a} and {b} at one scale."
        return {"task": task, "status": "no_claim", "winner": None, "scale": None, "sentence": sentence}
    record = primary.record()
    return {name: record[name] for name in ("task", "status", "winner", "scale", "sentence")}


def make_verdict(
    results: pd.DataFrame,
    *,
    experiment: str = "",
    tasks: Sequence[str] | None = None,
    primary: Pair = ("retrieved", "synthetic"),
    pocket: bool = False,
    missing: Sequence[str] = (),
) -> dict[str, Any]:
    """What `verdict.json` holds, as plain values; the order of the rows of `results` does not matter.

    `tasks` gives the order of the tasks (by name if None), `primary` the two sources of the primary contrasts, `missing` names
    trials of the grid that are not there. Scores and
    differences are in [-1, 1], sentences in points; an undefined number is None. Raises `IntegrityError` for a NaN score.
    """
    tasks = list(tasks) if tasks is not None else sorted(set(results["task"]))
    a, b = pair = _ordered(primary)
    contrasts = _contrasts(results, tasks, pair)
    verdict = {
        "experiment": experiment,
        "pocket": pocket,
        "confidence": stats.CONFIDENCE,
        "primary": {
            "contrast": f"{a} - {b}",
            "a": a,
            "b": b,
            "metric": PRIMARY_METRIC,
            "scale": "largest of each task",
            "correction": "Holm over tasks",
            "family": sum(contrast.primary for contrast in contrasts),
        },
        "headlines": [_headline(contrasts, task, pair) for task in tasks],
        "caveats": _caveats(contrasts, pocket, missing),
        "missing": list(missing),
        "contrasts": [contrast.record() for contrast in contrasts],
        "equivalences": _equivalences(results, tasks, pair),
        "cells": cells(results),
    }
    return _plain(verdict)


def _means_line(verdict: dict[str, Any], headline: dict[str, Any]) -> str:
    """Mean of each source at the headline's scale: `off the shelf 61.0 · retrieved 68.2 · …`."""
    found = {
        row["source"]: row["mean"]
        for row in verdict["cells"]
        if (row["task"], row["metric"]) == (headline["task"], PRIMARY_METRIC) and row["scale"] in (0, headline["scale"])
    }
    names = {source: "off the shelf" if source == "none" else visible(source) for source in found}
    order = sorted(in_order(found), key=lambda source: source != "none")
    return ", ".join(f"{names[source]} {found[source] * 100:.1f}" for source in order)


def verdict_text(verdict: dict[str, Any], width: int = 100) -> str:
    """The lines printed at the end of `rog compare`: one sentence and the means of each task, then the caveats."""
    lines = []
    for headline in verdict["headlines"]:
        sentence = headline["sentence"][0].upper() + headline["sentence"][1:]
        lines += textwrap.wrap(sentence, width, subsequent_indent="  ")
        lines += textwrap.wrap(_means_line(verdict, headline), width, initial_indent="  ", subsequent_indent="  ")
    lines.append("")
    for caveat in verdict["caveats"]:
        lines += textwrap.wrap(caveat, width)
    return "\n".join(lines)
