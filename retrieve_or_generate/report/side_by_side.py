"""Figures of a run that has several sets of a kind: all sources at the largest scale, and accuracy against strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from retrieve_or_generate import stats
from retrieve_or_generate.report.drawing import (
    INK,
    MUTED,
    Drawing,
    canvas,
    colour_of,
    label_of,
    marker_of,
    strength_of,
    svg_of,
)
from retrieve_or_generate.report.escaping import file_stem, shortened
from retrieve_or_generate.report.tables import METRICS, in_order, test_scores

_FEW = 4
"""Trained sources up to which curves against scale say enough."""

_LEAST_STRENGTHS = 3


def sources_panels(results: pd.DataFrame, tasks: Sequence[str]) -> dict[tuple[str, str], Drawing]:
    """A panel for each (task, metric): every source at the largest scale; none where sources are few."""
    return _panels(results, tasks, "sources", _sources_panel, lambda at: len(set(at) - {"none"}) > _FEW)


def strength_panels(results: pd.DataFrame, tasks: Sequence[str]) -> dict[tuple[str, str], Drawing]:
    """A panel for each (task, metric): accuracy of perturbed images against strength; none for fewer than three strengths."""
    return _panels(results, tasks, "strength", _strength_panel, lambda at: len(_strengths(at)) >= _LEAST_STRENGTHS)


Scores = dict[str, np.ndarray]
"""Accuracy in percent of every seed, by source."""


def _panels(
    results: pd.DataFrame,
    tasks: Sequence[str],
    name: str,
    draw: Callable[[Scores, str], bytes],
    wanted: Callable[[Scores], bool],
) -> dict[tuple[str, str], Drawing]:
    panels = {}
    for metric in METRICS:
        scores, taken = test_scores(results, metric), set[str]()
        for task in tasks:
            stem, (at, scale) = file_stem(task, taken), _at_largest_scale(scores, task)
            if wanted(at):
                words = "; ".join(f"{label_of(source)} {at[source].mean():.1f}" for source in in_order(at))
                told = (
                    f"{METRICS[metric]} on {shortened(task, 40)} at n = {scale:,}, mean over seeds in percent: {words}."
                )
                file = f"{name}-{stem}-{metric.removesuffix('_accuracy').replace('_', '-')}"
                panels[task, metric] = Drawing(file, draw(at, f"{METRICS[metric]} at n = {scale:,}, %"), told)
    return panels


def _at_largest_scale(scores: dict[tuple[str, str, int], pd.Series], task: str) -> tuple[Scores, int]:
    largest = max((scale for name, _, scale in scores if name == task), default=0)
    at = {source: v for (name, source, scale), v in scores.items() if name == task and scale in (0, largest)}
    return {source: values.to_numpy() * 100 for source, values in at.items()}, largest


def _strengths(at: Scores) -> dict[float, str]:
    """Sources by strength, the smallest first."""
    found = {strength: source for source in at if (strength := strength_of(source)) is not None}
    return dict(sorted(found.items()))


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % of Student's t for the mean; None for one seed."""
    interval = stats.paired_difference(values, np.zeros_like(values)) if len(values) > 1 else None
    return (interval.low, interval.high) if interval and interval.claims else None


def _sources_panel(at: Scores, unit: str) -> bytes:
    sources = in_order(source for source in at if source != "none")
    height = 26 * len(sources) + 56
    figure, grid = canvas(360, height)
    axes = grid[0, 0]
    _shelf(axes.axvline, at)
    for place, source in zip(range(0, -len(sources), -1), sources, strict=True):
        values, colour = at[source], colour_of(source)
        if bounds := _interval(values):
            axes.plot(bounds, [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(values, np.full(len(values), place - 0.28), "|", color=MUTED, markersize=5, markeredgewidth=1)
        axes.plot(values.mean(), place, marker_of(source), color=colour, markersize=7, markeredgecolor="white")
    axes.set_yticks(range(0, -len(sources), -1), [label_of(source) for source in sources])
    axes.set_ylim(-len(sources) + 0.35, 0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_xlabel(unit)
    left = 0.05 + 0.0185 * max(len(label_of(source)) for source in sources)
    figure.subplots_adjust(left=left, right=0.965, top=1 - 4 / height, bottom=46 / height)
    return svg_of(figure)


def _strength_panel(at: Scores, unit: str) -> bytes:
    figure, grid = canvas(360, 264)
    axes, by_strength = grid[0, 0], _strengths(at)
    x, sources = list(by_strength), list(by_strength.values())
    for strength, source in by_strength.items():
        values = at[source]
        axes.plot(np.full(len(values), strength), values, "^", color=colour_of(source), markersize=3, alpha=0.6)
        if bounds := _interval(values):
            axes.plot([strength, strength], bounds, color=colour_of(source), alpha=0.35, linewidth=4)
    axes.plot(x, [at[source].mean() for source in sources], "-^", color=colour_of("perturbed"), markersize=5.5)
    _shelf(axes.axhline, at)
    for source in ("retrieved", "synthetic"):
        if source in at:
            _level(axes, at[source].mean(), source)
    axes.set_xticks(x, [f"{strength:g}" for strength in x])
    axes.set_xlabel("strength (0: the autoencoder alone)")
    axes.set_ylabel(unit)
    axes.grid(True)
    figure.subplots_adjust(left=0.14, right=0.8, top=0.97, bottom=0.165)
    return svg_of(figure)


def _level(axes: Axes, height: float, source: str) -> None:
    """A source that has no strength, as a line with its name."""
    axes.axhline(height, color=colour_of(source), linewidth=1.4)
    axes.annotate(
        label_of(source), (1.01, height), xycoords=("axes fraction", "data"), color=colour_of(source), va="center"
    )


def _shelf(line: Callable[..., object], at: Scores) -> None:
    """The model off the shelf, dashed."""
    if "none" in at:
        line(float(at["none"].mean()), color=INK, linestyle=(0, (4, 3)), linewidth=1.0, zorder=0)
