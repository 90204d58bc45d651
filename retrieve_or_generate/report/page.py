"""The one HTML page of a run: self-contained, no scripts, nothing fetched, the same bytes for the same run folder."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd

from retrieve_or_generate.experiment import dump_experiment
from retrieve_or_generate.image_set import REASONS, ImageSet
from retrieve_or_generate.report import pictures
from retrieve_or_generate.report.drawing import Drawing
from retrieve_or_generate.report.escaping import shortened, visible
from retrieve_or_generate.report.run import Run
from retrieve_or_generate.report.tables import METRICS, REASON_WORDS, in_order
from retrieve_or_generate.report.verdict import POCKET_CAVEAT, PRIMARY_METRIC, count_of

_HERE = Path(__file__).parent
_OUTCOMES = {
    "difference": "{winner} wins",
    "lead": "No claim",
    "no_difference_shown": "No difference shown",
    "no_claim": "No claim",
}
_STATUS_WORDS = {"difference": "beats", "lead": "ahead, no claim", "no_difference_shown": "no difference shown"}


@dataclass(frozen=True)
class Figures:
    """Everything that is drawn for the page."""

    contrasts: dict[str, Drawing]
    accuracy: dict[tuple[str, str], Drawing]
    sources: dict[tuple[str, str], Drawing]
    shifts: dict[tuple[str, str, str], Drawing]
    strength: dict[tuple[str, str], Drawing]
    overview: Drawing
    curation: dict[str, Drawing]
    cost: Drawing

    def all(self) -> list[Drawing]:
        panels = (self.contrasts, self.accuracy, self.sources, self.shifts, self.strength, self.curation)
        return [drawing for drawn in panels for drawing in drawn.values()] + [self.overview, self.cost]


def _embedded(drawing: Drawing, task: str = "") -> dict[str, str]:
    return {
        "uri": pictures.data_uri(drawing.svg, "image/svg+xml"),
        "words": visible(drawing.words),
        "task": shortened(task, 60),
    }


def _typeset(sentence: str) -> str:
    """A sentence with a capital, true minus signs, and no line break within `n = 200` or `95 %`."""
    sentence = re.sub(r"(?<=[\[ ])-(?=\d)", "−", sentence)
    sentence = re.sub(r"\b([np]) ([=<]) ", "\\1\xa0\\2\xa0", sentence).replace(" %", "\xa0%")
    return sentence[:1].upper() + sentence[1:]


def _points(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.1f}".replace("-", "−")


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _summary(run: Run) -> str:
    """What was compared, in one sentence."""
    results = run.results
    tasks, trials = count_of("task", results["task"].nunique()), f"{results['trial'].nunique()} trials."
    trained = results[results["scale"] > 0]
    if trained.empty:
        return f"CLIP off the shelf on {tasks}, no source to compare: {trials}"
    scales = _listed(f"{scale:,}" for scale in sorted(set(trained["scale"])))
    seeds = count_of("seed", trained["seed"].nunique())
    against = ", against CLIP off the shelf" if len(trained) < len(results) else ""
    return (
        f"CLIP adapted to {tasks} with {_listed(in_order(trained['source']))} images, {scales} of them, "
        f"{seeds}{against}: {trials}"
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = map(visible, names)
    return f"{', '.join(most)} or {last}" if most else last


def _cards(verdict: dict[str, Any], figures: Figures) -> list[dict[str, Any]]:
    primary = {contrast["task"]: contrast for contrast in verdict["contrasts"] if contrast["primary"]}
    cards = []
    for headline in verdict["headlines"]:
        task, winner = headline["task"], headline["winner"]
        card: dict[str, Any] = {
            "task": shortened(task, 60),
            "sentence": _typeset(headline["sentence"]),
        }
        card["outcome"] = _OUTCOMES[headline["status"]].format(winner=str(winner).capitalize())
        card["won"] = winner and winner.partition("-")[0]
        card |= {"detectable": None, "contrast": None}
        detectable = primary.get(task, {}).get("minimum_detectable_effect")
        if headline["status"] == "no_difference_shown" and detectable:
            card["detectable"] = (
                f"With this spread, {detectable * 100:.1f} points would have been shown in four of five runs."
            )
        if task in figures.contrasts:
            card["contrast"] = _embedded(figures.contrasts[task], task)
        cards.append(card)
    return cards


def _with_first(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Mark each row whose `name` differs from the row above: there a rule is drawn."""
    above = [None, *(row[name] for row in rows)]
    return [row | {"first": row[name] != before} for row, before in zip(rows, above, strict=False)]


def _cell_rows(verdict: dict[str, Any], tasks: Sequence[str]) -> list[dict[str, Any]]:
    rank = {task: index for index, task in enumerate(tasks)}
    sources = in_order(row["source"] for row in verdict["cells"])
    ordered = sorted(
        verdict["cells"], key=lambda row: (rank[row["task"]], row["metric"], sources.index(row["source"]), row["scale"])
    )
    rows = [
        {
            "task": shortened(row["task"], 40),
            "metric": visible(row["metric"]),
            "source": visible(row["source"]),
            "scale": f"{row['scale']:,}",
            "mean": _points(row["mean"]),
            "sd": _points(row["sd"]),
            "n": row["n"],
            "values": "  ".join(_points(value) for value in row["values"]),
            "block": (row["task"], row["metric"]),
        }
        for row in ordered
    ]
    return _with_first(rows, "block")


def _contrast_rows(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in verdict["contrasts"]:
        bounds = f"[{_points(row['low'])}, {_points(row['high'])}]" if row["low"] is not None else ""
        rows.append(
            {
                "task": shortened(row["task"], 40),
                "metric": METRICS[row["metric"]],
                "scale": f"{row['scale']:,}",
                "pair": visible(f"{row['a']} − {row['b']}") + (" (primary)" if row["primary"] else ""),
                "mean": _points(row["mean"]),
                "interval": bounds,
                "n": row["n"],
                "detectable": _points(row["minimum_detectable_effect"]),
                "outcome": _STATUS_WORDS.get(row["status"], "no claim"),
                "block": (row["task"], row["metric"], row["scale"]),
                **{name: _p(row[name]) for name in ("p_t", "p_holm", "p_sign_flip")},
            }
        )
    return _with_first(rows, "block")


def _cost_rows(costs: pd.DataFrame) -> list[dict[str, Any]]:
    order = [*in_order(source for source in costs["source"] if source != "shared"), "shared"]
    rows = []
    for row in sorted(costs.to_dict("records"), key=lambda row: order.index(row["source"])):
        count = row["images"]
        rows.append(
            {
                "source": "off the shelf" if row["source"] == "none" else visible(row["source"]),
                "stage": shortened(row["stage"], 40),
                "seconds": f"{row['seconds']:.1f}",
                "images": f"{count:,} trials" if row["stage"] == "finetune" else f"{count:,}" if count else "",
                "rate": f"{row['seconds'] / count * 1000:.1f}" if count and row["stage"] != "finetune" else "",
                "memory": f"{row['memory_gib']:.2f}" if math.isfinite(row["memory_gib"]) else "",
            }
        )
    return _with_first(rows, "source")


def _of_tasks(sets: Sequence[ImageSet], tasks: Sequence[str]) -> list[tuple[str, list[ImageSet]]]:
    return [(task, [image_set for image_set in sets if image_set.task == task]) for task in tasks]


def _galleries(run: Run) -> list[dict[str, Any]]:
    found = [(task, pictures.gallery(sets)) for task, sets in _of_tasks(run.whole_sets, run.tasks)]
    return [vars(gallery) | {"task": shortened(task, 60)} for task, gallery in found if gallery]


def _strengths(run: Run) -> list[dict[str, Any]]:
    found = [(task, pictures.strength_strip(sets)) for task, sets in _of_tasks(run.sets, run.tasks)]
    return [vars(strip) | {"task": shortened(task, 60)} for task, strip in found if strip]


def _mixtures(run: Run) -> list[tuple[str, str]]:
    """Each mixed source and what it holds."""
    mixed = [(source, run.experiment.mix(source)) for source in in_order(run.experiment.sources)]
    return [(source, mix.words) for source, mix in mixed if mix]


def _environment(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in sorted(values.items()):
        if isinstance(value, dict):
            rows += _environment(value, f"{prefix}{name}.")
        else:
            rows.append((visible(prefix + name), visible(str(value))))
    return rows


def _exploratory_words(verdict: dict[str, Any]) -> str:
    number = sum(not contrast["primary"] and contrast["low"] is not None for contrast in verdict["contrasts"])
    by_chance = number * (1 - verdict["confidence"])
    return (
        f"there are {number}; if no source differed from another, about {by_chance:.0f} of their intervals would leave "
        "out 0 all the same."
    )


def _contents(context: dict[str, Any]) -> list[tuple[str, str]]:
    sections = [
        ("verdict", "Verdict", True),
        ("accuracy", "Accuracy", True),
        ("sources", "Sources", context["by_source"]),
        ("shift", "Under shift", context["by_shift"]),
        ("images", "Images", True),
        ("strength", "Strength", context["strengths"] or context["by_strength"]),
        ("curation", "Curation", context["curation"]),
        ("cost", "Cost", True),
        ("reading", "How to read this", True),
        ("numbers", "All numbers", True),
    ]
    return [(anchor, name) for anchor, name, there in sections if there]


def _metric_blocks(run: Run, drawn: dict[tuple[str, str], Drawing]) -> list[dict[str, Any]]:
    blocks = []
    for metric, words in METRICS.items():
        panels = [_embedded(drawn[task, metric], task) for task in run.tasks if (task, metric) in drawn]
        if panels:
            blocks.append({"name": words[0].upper() + words[1:], "panels": panels})
    return blocks


def _shift_context(verdict: dict[str, Any], figures: Figures) -> dict[str, Any]:
    """The panels of each metric, and the table."""
    blocks = []
    for metric, words in METRICS.items():
        panels = [_embedded(one, f"{key[0]}, {key[1]}") for key, one in figures.shifts.items() if key[2] == metric]
        blocks += [{"name": words[0].upper() + words[1:], "panels": panels}] if panels else []
    numbers = ("own", "shifted", "sd", "drop", "own_gain", "shifted_gain")
    rows = [
        {name: _points(row[name]) for name in numbers}
        | {"task": shortened(row["task"], 40), "shift": shortened(row["shift"], 40) + " *" * row["among_some"]}
        | {"source": "off the shelf" if row["source"] == "none" else visible(row["source"]), "n": row["n"]}
        | {"metric": METRICS[row["metric"]], "scale": f"{row['scale']:,}" if row["scale"] else ""}
        | {"block": (row["task"], row["shift"], row["metric"])}
        for row in verdict["shifts"]
    ]
    some = any(row["among_some"] for row in verdict["shifts"])
    return {"by_shift": blocks, "shifted": _with_first(rows, "block"), "shifted_among_some": some}


def _curation_context(run: Run, figures: Figures, curation: list[dict[str, Any]]) -> dict[str, Any]:
    seen = [reason for reason in REASONS if any(row["reasons"][reason] for row in curation)]
    shown = [
        row | {"task": shortened(row["task"], 40), "emptiest": shortened(row["emptiest"], 30)}
        for task in run.tasks
        for row in curation
        if row["task"] == task
    ]
    return {
        "curation": _with_first(shown, "task"),
        "reasons": [{"name": reason, "words": REASON_WORDS[reason]} for reason in seen],
        "curation_panels": [_embedded(figures.curation[task], task) for task in run.tasks if task in figures.curation],
    }


def render(
    run: Run, verdict: dict[str, Any], figures: Figures, curation: list[dict[str, Any]], costs: pd.DataFrame
) -> bytes:
    """The page as UTF-8. Text from outside is made visible here and escaped by jinja2."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    primary = verdict["primary"]
    context: dict[str, Any] = {
        "title": visible(run.experiment.name),
        "style": markupsafe.Markup(style),
        "style_hash": f"sha256-{digest}",
        "summary": _summary(run),
        "pocket": run.pocket,
        "pocket_caveat": POCKET_CAVEAT,
        "primary_words": f"{visible(primary['a'])} − {visible(primary['b'])}, {METRICS[PRIMARY_METRIC]} on test",
        "cards": _cards(verdict, figures),
        "any_contrast": bool(figures.contrasts),
        "caveats": [_typeset(caveat) for caveat in verdict["caveats"] if caveat != POCKET_CAVEAT],
        "metrics": _metric_blocks(run, figures.accuracy),
        "mixtures": _mixtures(run),
        "by_source": _metric_blocks(run, figures.sources),
        "by_strength": _metric_blocks(run, figures.strength),
        **_shift_context(verdict, figures),
        "equivalences": [_typeset(row["sentence"]) for row in verdict["equivalences"]],
        "galleries": _galleries(run),
        "per_class": pictures.PER_STRIP * pictures.STRIPS,
        "strengths": _strengths(run),
        "cost_panel": _embedded(figures.cost),
        "costs": _cost_rows(costs),
        "devices": _listed(sorted(set(run.results["device"]))),
        "exploratory_words": _exploratory_words(verdict),
        "cells": _cell_rows(verdict, run.tasks),
        "contrasts": _contrast_rows(verdict),
        "experiment_file": "\n".join(visible(line) for line in dump_experiment(run.experiment).splitlines()),
        "environment": _environment(run.environment),
        **_curation_context(run, figures, curation),
    }
    context["contents"] = _contents(context)
    loader = jinja2.FileSystemLoader(_HERE)
    engine = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return engine.get_template("page.html.j2").render(context).encode()
