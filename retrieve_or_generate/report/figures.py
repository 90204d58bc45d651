"""The report's figures: one panel a task, made to be read at 360 pixels, and `accuracy.svg` with all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from retrieve_or_generate.image_set import REASONS
from retrieve_or_generate.report.drawing import INK, MUTED, Drawing, canvas, colour_of, label_of, marker_of, svg_of
from retrieve_or_generate.report.escaping import file_stem, shortened
from retrieve_or_generate.report.tables import METRICS, REASON_WORDS, in_order, test_scores

_REASON_COLOURS = (
    *("#882255", "#aa4466", "#664444", "#777799", "#999999", "#b08d57", "#c7b299", "#bbbbbb"),
    *("#cc6677", "#a08bc4", "#ddaa33", "#bfd3e6", "#9fc5b5", "#dddddd", "#5d5d9d", "#222222"),
)
_BESIDE = 1.035  # from one source to the next, so that points at one scale do not hide each other
_STAGE_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#999999", "#f0e442")


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights moved apart, upwards and then down from the ceiling, so that labels lie `gap` apart within [low, high]."""
    order = np.argsort(heights, kind="stable")
    placed = np.clip(np.asarray(heights, dtype=float)[order], low, high)
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    placed[-1] = min(placed[-1], high)
    for index in range(len(placed) - 2, -1, -1):
        placed[index] = min(placed[index], placed[index + 1] - gap)
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def _curve(axes: Axes, source: str, place: float, points: dict[int, np.ndarray]) -> float:
    """One source: every seed's point, mean ± sd, a line through the means. Returns the last mean."""
    colour, marker = colour_of(source), marker_of(source)
    scales = sorted(points)
    x = np.array(scales) * place
    means = np.array([points[scale].mean() for scale in scales])
    for at, scale in zip(x, scales, strict=True):
        values = points[scale]
        axes.plot(np.full(len(values), at), values, marker, color=colour, markersize=3, alpha=0.55, markeredgewidth=0)
        if len(values) > 1:
            spread = values.std(ddof=1)
            ends = [values.mean() - spread, values.mean() + spread]
            axes.plot([at, at], ends, color=colour, alpha=0.3, linewidth=4, solid_capstyle="butt")
    axes.plot(x, means, color=colour, marker=marker, markersize=5.5, linewidth=1.8, markeredgecolor="white")
    return float(means[-1])


def _beyond(sources: Iterable[str]) -> int:
    """Pixels that the longest label beside a panel takes beyond ten letters, for which there is room always."""
    return 8 * max([0, *(len(label_of(source)) - 10 for source in sources if source != "none")])


def _label_ends(axes: Axes, ends: dict[str, float], right: float) -> None:
    low, high = axes.get_ylim()
    sources = list(ends)
    places = _apart([ends[source] for source in sources], (high - low) * 0.075, low, high)
    for source, place in zip(sources, places, strict=True):
        axes.annotate(
            label_of(source),
            (right, place),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour_of(source),
            fontweight="bold" if source != "none" else "normal",
            verticalalignment="center",
            annotation_clip=False,
        )


def _accuracy_axes(axes: Axes, scores: dict[tuple[str, str, int], pd.Series], task: str) -> None:
    mine: dict[str, dict[int, np.ndarray]] = {}
    for (name, source, scale), values in scores.items():
        if name == task:
            mine.setdefault(source, {})[scale] = values.to_numpy() * 100
    trained = in_order(source for source in mine if source != "none")
    scales = sorted({scale for source in trained for scale in mine[source]})
    axes.grid(True)
    axes.set_xscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    ends = {}
    middle = (len(trained) - 1) / 2
    for index, source in enumerate(trained):
        ends[source] = _curve(axes, source, _BESIDE ** (index - middle), mine[source])
    if "none" in mine:
        ends["none"] = float(mine["none"][0].mean())
        axes.axhline(ends["none"], color=colour_of("none"), linestyle=(0, (4, 3)), linewidth=1.2)
    if scales:
        margin = max(1.12, _BESIDE ** (middle + 1)) * (scales[-1] / scales[0]) ** 0.04
        axes.set_xlim(scales[0] / margin, scales[-1] * margin)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(scales, [f"{scale:,}" for scale in scales])
        _label_ends(axes, ends, scales[-1] * margin)
    axes.set_xlabel("training images")


def _accuracy_words(scores: dict[tuple[str, str, int], pd.Series], task: str, metric: str) -> str:
    parts = [
        f"{label_of(source)}{f' n={scale}' if scale else ''} {values.mean() * 100:.1f}"
        for (name, source, scale), values in scores.items()
        if name == task
    ]
    return f"{METRICS[metric]} on {shortened(task, 40)}, mean over seeds in percent: {'; '.join(parts)}."


def accuracy_panels(results: pd.DataFrame, tasks: Sequence[str]) -> dict[tuple[str, str], Drawing]:
    """A panel for each (task, metric): accuracy on test against scale."""
    panels = {}
    for metric in METRICS:
        scores, taken = test_scores(results, metric), set[str]()
        for task in tasks:
            stem = file_stem(task, taken)
            if not any(name == task for name, _, _ in scores):
                continue
            figure, axes = canvas(360, 264)
            _accuracy_axes(axes[0, 0], scores, task)
            axes[0, 0].set_ylabel(f"{METRICS[metric]}, %")
            right = 0.755 - _beyond(source for name, source, _ in scores if name == task) / 360
            figure.subplots_adjust(left=0.14, right=right, top=0.97, bottom=0.165)
            name = f"accuracy-{stem}-{metric.removesuffix('_accuracy').replace('_', '-')}"
            panels[task, metric] = Drawing(name, svg_of(figure), _accuracy_words(scores, task, metric))
    return panels


def accuracy_overview(results: pd.DataFrame, tasks: Sequence[str]) -> Drawing:
    """All panels in one figure on white: a column a task, at most four beside each other, and a row a metric."""
    columns = min(4, len(tasks))
    blocks = [tasks[start : start + columns] for start in range(0, len(tasks), columns)]
    rows = [(block, metric) for block in blocks for metric in METRICS]
    wide, tall = 40 + 330 * columns, 70 + 250 * len(rows)
    figure, grid = canvas(wide, tall, len(rows), columns)
    for axes in grid.flat:
        axes.set_visible(False)
    for line, (block, metric) in zip(grid, rows, strict=True):
        scores = test_scores(results, metric)
        for axes, task in zip(line, block, strict=False):
            axes.set_visible(True)
            _accuracy_axes(axes, scores, task)
            axes.set_title(shortened(task, 30), pad=8)
        line[0].set_ylabel(f"{METRICS[metric]}, %")
    figure.align_ylabels(grid[:, 0])
    figure.subplots_adjust(
        left=54 / wide, right=1 - 92 / wide, top=1 - 34 / tall, bottom=42 / tall, wspace=0.5, hspace=0.38
    )
    words = "Accuracy on test against the number of training images, per task and metric."
    return Drawing("accuracy", svg_of(figure, "white"), words)


def _contrast_colour(contrast: dict[str, Any]) -> str:
    return colour_of(contrast["winner"]) if contrast["winner"] else MUTED


def _contrast_row(axes: Axes, height: float, contrast: dict[str, Any]) -> None:
    colour = _contrast_colour(contrast)
    if contrast["low"] is not None:
        axes.plot([contrast["low"] * 100, contrast["high"] * 100], [height, height], color=colour, linewidth=2)
    seeds = np.array(contrast["differences"]) * 100
    axes.plot(seeds, np.full(len(seeds), height - 0.27), "|", color=MUTED, markersize=5, markeredgewidth=1)
    face = colour if contrast["primary"] else "white"
    axes.plot(
        contrast["mean"] * 100, height, "o", color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.6
    )


def contrast_panels(verdict: dict[str, Any], tasks: Sequence[str]) -> dict[str, Drawing]:
    """A panel for each task: the primary pair's a − b with its interval, for every metric and scale."""
    pair = verdict["primary"]["a"], verdict["primary"]["b"]
    chosen = [contrast for contrast in verdict["contrasts"] if (contrast["a"], contrast["b"]) == pair]
    ends = [
        100 * abs(value)
        for contrast in chosen
        for value in (contrast["low"], contrast["high"], contrast["mean"])
        if value
    ]
    limit = 1.08 * max(ends, default=1.0)
    panels, taken = {}, set[str]()
    for task in tasks:
        stem, rows = file_stem(task, taken), [contrast for contrast in chosen if contrast["task"] == task]
        if rows:
            words = " ".join(contrast["sentence"] for contrast in rows)
            panels[task] = Drawing(f"contrast-{stem}", _contrast_panel(rows, pair, limit), words)
    return panels


def _contrast_panel(rows: list[dict[str, Any]], pair: tuple[str, str], limit: float) -> bytes:
    metrics = [metric for metric in METRICS if any(row["metric"] == metric for row in rows)]
    tall = len(rows) + 0.8 * len(metrics)
    height = 24 * tall + 52
    figure, axes = canvas(360, height)
    ax, at = axes[0, 0], 0.0
    ticks: dict[float, str] = {}
    for metric in metrics:
        at -= 0.8
        words = f"{METRICS[metric]}, points"
        ax.text(-0.235, at + 0.3, words, transform=ax.get_yaxis_transform(), color=MUTED, verticalalignment="center")
        for row in sorted((row for row in rows if row["metric"] == metric), key=lambda row: row["scale"]):
            at -= 1
            ticks[at + 0.5] = f"n = {row['scale']:,}"
            _contrast_row(ax, at + 0.5, row)
    ax.axvline(0, color=INK, linewidth=0.8, zorder=0)
    ax.set_xlim(-limit, limit)
    ax.set_ylim(at - 0.15, 0)
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(f"← {label_of(pair[1])} ahead  |  {label_of(pair[0])} ahead →")
    figure.subplots_adjust(left=0.19, right=0.97, top=1 - 2 / height, bottom=46 / height)
    return svg_of(figure)


def _stacked(axes: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]], colours: dict[str, str]) -> None:
    """Horizontal bars from top to bottom, one part after the other."""
    heights, left = -np.arange(len(labels)), np.zeros(len(labels))
    for name, sizes in parts.items():
        axes.barh(
            heights, sizes, left=left, height=0.62, color=colours[name], label=name, edgecolor="white", linewidth=0.5
        )
        left += np.asarray(sizes, dtype=float)
    axes.set_yticks(heights, labels)
    axes.set_xlim(0, max(float(left.max()), 1e-9) * 1.02)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


def _bars(labels: Sequence[str], parts: Mapping[str, Sequence[float]], colours: dict[str, str], unit: str) -> bytes:
    legend_rows = math.ceil(len(parts) / 2)
    height = 30 * len(labels) + 56 + 17 * legend_rows
    figure, axes = canvas(360, height)
    _stacked(axes[0, 0], labels, parts, colours)
    axes[0, 0].set_xlabel(unit)
    left = 0.03 + 0.018 * max(len(label) for label in labels)
    figure.subplots_adjust(left=left, right=0.965, top=1 - 4 / height, bottom=(48 + 17 * legend_rows) / height)
    figure.legend(
        loc="lower left", ncols=2, fontsize=8, handlelength=1, handleheight=1, columnspacing=1.2, borderaxespad=0.2
    )
    return svg_of(figure)


def curation_panels(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> dict[str, Drawing]:
    """A panel for each task: what became of each source's candidates."""
    panels, taken = {}, set[str]()
    for task in tasks:
        stem, mine = file_stem(task, taken), [row for row in rows if row["task"] == task]
        if not mine:
            continue
        seen = [reason for reason in REASONS if any(row["reasons"][reason] for row in mine)]
        parts = {"kept": [row["kept"] for row in mine]}
        parts |= {REASON_WORDS[reason]: [row["reasons"][reason] for row in mine] for reason in seen}
        colours = {"kept": "#0b5d4e"} | dict(
            zip((REASON_WORDS[reason] for reason in REASONS), _REASON_COLOURS, strict=True)
        )
        svg = _bars([shortened(row["label"], 16) for row in mine], parts, colours, "candidates")
        words = "; ".join(f"{row['label']}: {row['kept']} of {row['candidates']} candidates kept" for row in mine)
        panels[task] = Drawing(f"curation-{stem}", svg, f"Curation on {shortened(task, 40)}: {shortened(words, 400)}.")
    return panels


def cost_panel(costs: pd.DataFrame) -> Drawing:
    """Seconds of each source, by stage, all tasks together."""
    order = [source for source in [*in_order(costs["source"]), "shared"] if source != "shared"]
    order += ["shared"] * ("shared" in set(costs["source"]))
    stages = list(dict.fromkeys(costs["stage"]))
    table = costs.pivot_table(index="source", columns="stage", values="seconds", aggfunc="sum", fill_value=0.0)
    parts = {shortened(stage, 20): [float(table.loc[source, stage]) for source in order] for stage in stages}
    colours = {name: _STAGE_COLOURS[index % len(_STAGE_COLOURS)] for index, name in enumerate(parts)}
    svg = _bars([label_of(source) for source in order], parts, colours, "seconds, all tasks together")
    totals = "; ".join(f"{label_of(source)} {table.loc[source].sum():.0f}" for source in order)
    return Drawing("cost", svg, f"Seconds by source: {totals}.")
