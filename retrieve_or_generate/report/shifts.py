"""Accuracy under shift beside accuracy on the task's own test images. Exploratory: no part of the verdict.

Where a shift shows some classes only, both are measured among these (`finetune/measured.py`). To gain much on test images of the
training distribution and less on others is the usual way of fine-tuning; Taori et al. (arXiv 2007.00644) call what lies above the
usual line effective robustness. No family of models is at hand here to fit that line to, so the line drawn is only that of equal
gains from the model off the shelf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from retrieve_or_generate.report.drawing import MUTED, Drawing, canvas, colour_of, label_of, marker_of, svg_of
from retrieve_or_generate.report.escaping import file_stem, shortened
from retrieve_or_generate.report.tables import METRICS, in_order, scores_on

_LETTERS_IN_A_ROW = 44  # of four labels in the legend

Key = tuple[str, str, str]
"""Task, shift and metric."""


@dataclass(frozen=True)
class ShiftedCell:
    """One (task, shift, metric, source, scale): `own` and `shifted` accuracy of each seed, shares in [0, 1], in order of seed.

    `among_some`: of the classes that the shift shows alone.
    """

    task: str
    shift: str
    metric: str
    source: str
    scale: int
    own: np.ndarray
    shifted: np.ndarray
    among_some: bool

    @property
    def key(self) -> Key:
        return self.task, self.shift, self.metric

    def record(self, shelf: ShiftedCell | None) -> dict[str, Any]:
        """The cell as plain values for `verdict.json` and the table; gains are over the model off the shelf."""
        several = len(self.shifted) > 1
        gains = (
            {"own_gain": _gain(self.own, shelf.own), "shifted_gain": _gain(self.shifted, shelf.shifted)}
            if shelf and shelf is not self
            else {"own_gain": None, "shifted_gain": None}
        )
        return {
            **{name: getattr(self, name) for name in ("task", "shift", "metric", "source", "scale", "among_some")},
            "n": len(self.shifted),
            "own": float(self.own.mean()),
            "shifted": float(self.shifted.mean()),
            "sd": float(self.shifted.std(ddof=1)) if several else None,
            "drop": float((self.own - self.shifted).mean()),
            **gains,
            "values": self.shifted.tolist(),
        }


def _gain(values: np.ndarray, shelf: np.ndarray) -> float:
    return float(values.mean() - shelf.mean())


def shifted_cells(results: pd.DataFrame, tasks: Sequence[str]) -> list[ShiftedCell]:
    """Every cell of every shift, in the order of the tasks, of the shifts' names and of the sources."""
    names = sorted(split for split in set(results["split"]) if split.partition("/")[0] != "test")
    cells = []
    for shift in names:
        for metric in METRICS:
            shifted, among = scores_on(results, metric, shift), scores_on(results, metric, f"test/{shift}")
            whole = scores_on(results, metric)
            for cell, values in shifted.items():
                beside = among.get(cell, whole.get(cell))
                if beside is not None:
                    pair = pd.concat([beside, values], axis=1, join="inner").to_numpy().T
                    cells.append(ShiftedCell(cell[0], shift, metric, *cell[1:], pair[0], pair[1], cell in among))
    sources = in_order(cell.source for cell in cells)
    rank = {task: place for place, task in enumerate(tasks)}
    metrics = list(METRICS)
    return sorted(
        (cell for cell in cells if cell.task in rank),
        key=lambda c: (rank[c.task], c.shift, metrics.index(c.metric), sources.index(c.source), c.scale),
    )


def records(cells: Sequence[ShiftedCell]) -> list[dict[str, Any]]:
    """Rows for the table and for `verdict.json`."""
    shelves = {cell.key: cell for cell in cells if cell.source == "none"}
    return [cell.record(shelves.get(cell.key)) for cell in cells]


def shift_panels(cells: Sequence[ShiftedCell]) -> dict[Key, Drawing]:
    """A panel for each (task, shift, metric): accuracy under shift against that on own test images, every seed and the means."""
    panels, taken = {}, set[str]()
    for key, group in groupby(cells, lambda cell: cell.key):
        mine, (task, shift, metric) = list(group), key
        stem = file_stem(f"{task}-{shift}-{metric.removesuffix('_accuracy')}", taken)
        panels[key] = Drawing(f"shift-{stem}", _panel(mine, METRICS[metric]), _words(mine, key))
    return panels


def _panel(cells: Sequence[ShiftedCell], metric: str) -> bytes:
    figure, grid = canvas(360, 300)
    axes = grid[0, 0]
    for source, group in groupby(cells, lambda cell: cell.source):
        _curve(axes, source, list(group))
    shelf = next((cell for cell in cells if cell.source == "none"), None)
    if shelf is not None:
        at = shelf.own.mean() * 100, shelf.shifted.mean() * 100
        limits = axes.get_xlim(), axes.get_ylim()
        axes.axline(at, slope=1, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0, zorder=0)
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
    axes.grid(True, axis="both")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(f"{metric} on own test images, %")
    axes.set_ylabel("under shift, %")
    labels = [label_of(source) for source in dict.fromkeys(cell.source for cell in cells)]
    columns = 4 if sum(map(len, labels)) <= _LETTERS_IN_A_ROW else 3
    legend_rows = math.ceil(len(labels) / columns)
    figure.subplots_adjust(left=0.14, right=0.97, top=0.97, bottom=(48 + 17 * legend_rows) / 300)
    figure.legend(loc="lower left", ncols=columns, fontsize=8, handlelength=1.2, columnspacing=0.9, borderaxespad=0.2)
    return svg_of(figure)


def _curve(axes: Axes, source: str, cells: Sequence[ShiftedCell]) -> None:
    """One source: a dot for every seed, and a line through the means from the smallest scale to the largest."""
    colour, marker = colour_of(source), marker_of(source) or "P"
    for cell in cells:
        axes.plot(cell.own * 100, cell.shifted * 100, marker, color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
    x, y = [[getattr(cell, name).mean() * 100 for cell in cells] for name in ("own", "shifted")]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label_of(source))
    axes.plot(x[-1:], y[-1:], marker, color=colour, markersize=8, markeredgecolor="white")


def _words(cells: Sequence[ShiftedCell], key: Key) -> str:
    task, shift, metric = key
    told = "; ".join(
        f"{label_of(cell.source)}{f' n={cell.scale}' if cell.scale else ''} {cell.own.mean() * 100:.1f} and "
        f"{cell.shifted.mean() * 100:.1f}"
        for cell in cells
    )
    where = f"{shortened(task, 40)} and on its shift {shortened(shift, 40)}"
    return f"{METRICS[metric]} on own test images of {where}, mean over seeds in percent: {told}."
