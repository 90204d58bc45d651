"""Rows for the report's tables, and `results.csv`. Everything is a plain count, sum, mean or sample deviation of what was read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from retrieve_or_generate import stats
from retrieve_or_generate.image_set import REASONS, ImageSet
from retrieve_or_generate.report.escaping import csv_cell

SOURCES = ("retrieved", "synthetic", "perturbed", "mixed", "none")
"""The order in which sources are shown and subtracted; others stand before `none`, by name."""

METRICS = {"linear_probe_accuracy": "linear-probe accuracy", "zero_shot_accuracy": "zero-shot accuracy"}
"""The metrics that are drawn and contrasted, with their words; higher is better, values in [0, 1], shown in points."""

REASON_WORDS = {
    "nsfw": "tagged NSFW",
    "unsafe": "unsafe",
    "blocked": "on the blocklist",
    "refused": "refused, by the site or by us",
    "dead_link": "dead link",
    "mismatch": "other bytes than the pool knows",
    "placeholder": "placeholder",
    "undecodable": "not decodable",
    "contaminated": "copy of a val or test image",
    "memorised": "copy of an image of the pool",
    "duplicate": "copy within the set",
    "clip_score": "low CLIP score",
    "not_selected": "not selected",
    "class_cap": "class already full",
    "short_class": "class too small, left out",
    "takedown": "taken down",
}


def in_order(sources: Iterable[str]) -> list[str]:
    """Distinct sources in the order of `SOURCES`; several of a kind by number, where their names end in one, else by name."""
    rank = {source: index for index, source in enumerate(SOURCES)}

    def place(source: str) -> tuple[float, float, str]:
        kind, _, name = source.partition("-")
        return rank.get(kind, rank["none"] - 0.5), _number(name), source

    return sorted(set(sources), key=place)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def scores_on(results: pd.DataFrame, metric: str, split: str = "test") -> dict[tuple[str, str, int], pd.Series]:
    """Scores of `metric` on the images of `split`: (task, source, scale) → Series indexed by seed, sorted."""
    rows = results[(results["metric"] == metric) & (results["split"] == split)]
    groups = rows.groupby(["task", "source", "scale"], sort=True)
    return {
        (str(task), str(source), int(scale)): group.set_index("seed")["value"].sort_index()
        for (task, source, scale), group in groups
    }


def test_scores(results: pd.DataFrame, metric: str) -> dict[tuple[str, str, int], pd.Series]:
    """The same on the task's own test images, which all is drawn and decided on."""
    return scores_on(results, metric)


def cells(results: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean, sample deviation and every value of each (task, source, scale, metric) on test, all metrics."""
    rows = []
    for metric in sorted(set(results["metric"])):
        for (task, source, scale), values in test_scores(results, metric).items():
            finite = values[np.isfinite(values)]
            if len(finite):
                summary = stats.summarise(finite.to_numpy())
                row = {"task": task, "source": source, "scale": scale, "metric": metric, "n": summary.n}
                row |= {"mean": summary.mean, "sd": summary.sd, "values": finite.tolist()}
                rows.append(row)
    return rows


def name_of(image_set: ImageSet) -> str:
    """What the run calls its source: `retrieved`, `synthetic-llm`."""
    name = image_set.folder.name
    return name if name.startswith(f"{image_set.source}-") else image_set.source


def label_of(image_set: ImageSet) -> str:
    """The same, with the strength where there is one and the name does not say it: `perturbed 0.4`."""
    strengths, name = np.unique(image_set.manifest["strength"].dropna()), name_of(image_set)
    return f"{name} {strengths[0]:.3g}" if len(strengths) == 1 and name == image_set.source else name


def curation(sets: Sequence[ImageSet]) -> list[dict[str, Any]]:
    """Per image set: candidates, the number dropped for each reason, kept, and the fewest kept in one class."""
    rows = []
    for image_set in sets:
        reasons = image_set.manifest["reason"].value_counts()
        row: dict[str, Any] = {"task": image_set.task, "source": name_of(image_set), "label": label_of(image_set)}
        row |= {"candidates": len(image_set.manifest), "reasons": {name: int(reasons.get(name, 0)) for name in REASONS}}
        row |= {"kept": len(image_set.kept), "fewest": int(image_set.counts().min())}
        row["emptiest"] = image_set.class_names[int(image_set.counts().argmin())]
        rows.append(row)
    return rows


def costs(results: pd.DataFrame, stages: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Seconds of each (source, stage): what `stages` says, and the trials' own seconds as stage `finetune`.

    Columns source, stage, seconds, images (handled, trials for `finetune`), memory_gib (the highest seen, nan if unknown).
    Work that no single source asked for has the source `shared`.
    """
    rows = [
        {
            "source": entry.get("source") or "shared",
            "stage": entry["stage"],
            "seconds": float(entry["wall_seconds"]),
            "images": int(entry.get("images") or 0),
            "memory_gib": entry.get("peak_memory_gib"),
        }
        for entry in stages
        if entry["stage"] != "finetune"
    ]
    trials = results.drop_duplicates("trial")
    for source, group in trials.groupby("source", sort=True):
        seconds = float(group["wall_seconds"].sum())
        rows.append(
            {"source": source, "stage": "finetune", "seconds": seconds, "images": len(group), "memory_gib": None}
        )
    table = pd.DataFrame(rows, columns=["source", "stage", "seconds", "images", "memory_gib"])
    table["memory_gib"] = pd.to_numeric(table["memory_gib"])
    sums = {"seconds": "sum", "images": "sum", "memory_gib": "max"}
    return table.groupby(["source", "stage"], sort=False, as_index=False).agg(sums)


def results_csv(results: pd.DataFrame) -> bytes:
    """The rows of `results.parquet` as RFC 4180 text; floats with all their digits, text cells by `csv_cell`."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(results.columns)
    for row in results.itertuples(index=False, name=None):
        writer.writerow([csv_cell(value) for value in row])
    return buffer.getvalue().encode()
