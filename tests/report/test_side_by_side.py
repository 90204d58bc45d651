"""Figures for runs with several sets of a kind."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from retrieve_or_generate.report import side_by_side
from retrieve_or_generate.report.drawing import colour_of, label_of, marker_of, styled
from retrieve_or_generate.report.tables import in_order


def renamed(results: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The same run with the perturbed source's rows under each of these names."""
    mine = results[results["source"] == "perturbed"]
    return pd.concat([results, *(mine.assign(source=name) for name in names)])


def test_a_run_of_few_sources_has_curves_alone(results_of: Callable[..., pd.DataFrame]) -> None:
    assert side_by_side.sources_panels(results_of(), ["digits"]) == {}
    assert side_by_side.strength_panels(results_of(), ["digits"]) == {}


def test_strategies_stand_side_by_side_with_their_numbers(results_of: Callable[..., pd.DataFrame]) -> None:
    results = renamed(results_of(), "synthetic-llm", "synthetic-places")
    with styled():
        panels = side_by_side.sources_panels(results, ["digits"])
    assert {metric for _, metric in panels} == {"linear_probe_accuracy", "zero_shot_accuracy"}
    drawing = panels["digits", "linear_probe_accuracy"]
    top = results[(results["task"] == "digits") & (results["metric"] == "linear_probe_accuracy")]
    mean = top[(top["source"] == "synthetic-llm") & (top["scale"] == top["scale"].max())]["value"].mean() * 100
    assert f"llm {mean:.1f}" in drawing.words
    for label in ("llm", "places", "retrieved", "synthetic"):
        assert f">{label}<" in drawing.svg.decode()


def test_mixtures_are_told_apart_by_label_and_marker() -> None:
    mixed = ("mixed-half", "mixed-added", "mixed-weighed")
    assert [label_of(one) for one in mixed[:2]] == ["mixed half", "mixed added"]
    assert len(label_of(mixed[2])) == 12
    assert len({(colour_of(one), marker_of(one)) for one in (*mixed, "mixed", "synthetic-llm")}) == 5


def test_strengths_are_drawn_by_number(results_of: Callable[..., pd.DataFrame]) -> None:
    results = renamed(results_of(), "perturbed-0.8", "perturbed-0", "perturbed-0.35")
    assert in_order(results["source"])[2:6] == ["perturbed", "perturbed-0", "perturbed-0.35", "perturbed-0.8"]
    with styled():
        text = side_by_side.strength_panels(results, ["digits"])["digits", "zero_shot_accuracy"].svg.decode()
    assert all(f">{number}<" in text for number in ("0", "0.35", "0.8"))
    assert text.index(">0.35<") < text.index(">0.8<")


def test_one_seed_has_no_interval_and_is_drawn(results_of: Callable[..., pd.DataFrame]) -> None:
    results = renamed(results_of(seeds=1), "perturbed-0", "perturbed-0.2", "perturbed-0.4")
    with styled():
        assert side_by_side.sources_panels(results, ["digits"])
        assert side_by_side.strength_panels(results, ["digits"])


def test_names_and_colours_of_one_of_several() -> None:
    assert [label_of(name) for name in ("none", "synthetic-llm", "perturbed-0.4")] == [
        "off the shelf",
        "llm",
        "strength 0.4",
    ]
    assert len({colour_of(f"perturbed-{strength}") for strength in (0, 0.2, 0.4, 0.8)}) == 4


def test_every_source_of_a_run_has_a_look_of_its_own() -> None:
    strategies = ("class_name", "templates", "places", "alt_text", "image_captions", "llm", "file")
    sources = ["retrieved", "synthetic", "perturbed", "none", *(f"synthetic-{one}" for one in strategies)]
    sources += ["perturbed-file", "perturbed-0.2", "mixed-retrieved-30", "mixed-retrieved-70", "mixed-retrieved-700"]
    alone = {source: (colour_of(source), label_of(source)) for source in sources[:4]}
    with styled(reversed(sources)):
        assert len({label_of(source) for source in sources}) == len(sources)
        assert all(len(label_of(source)) <= 14 for source in sources)
        assert len({(colour_of(source), marker_of(source)) for source in sources}) == len(sources)
        assert len({colour_of(source) for source in sources[:11]}) == 11  # there are so many
        assert {source: (colour_of(source), label_of(source)) for source in sources[:4]} == alone
        assert [label_of(source) for source in sources[-3:]] == ["mixed retri…", "…trieved-70", "…rieved-700"]
        assert label_of("perturbed-file") == "perturbed-file"
    assert len({colour_of(f"synthetic-{one}") for one in strategies}) == 4  # by their names alone


def test_more_sources_than_looks_are_drawn_all_the_same() -> None:
    sources = [f"synthetic-{'x' * 30}{number}" for number in range(60)]
    with styled(sources):
        assert len({label_of(source) for source in sources}) == 60
        assert len({(colour_of(source), marker_of(source)) for source in sources}) == 42  # seven colours, six markers
