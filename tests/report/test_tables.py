import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.image_set import REASONS, load_image_set
from retrieve_or_generate.report import tables
from retrieve_or_generate.report.run import COLUMNS


def test_sources_are_shown_in_one_order_whoever_comes_first() -> None:
    assert tables.in_order(["none", "zebra", "synthetic", "ape", "retrieved", "none"]) == [
        "retrieved",
        "synthetic",
        "ape",
        "zebra",
        "none",
    ]


def test_several_of_a_kind_come_by_their_numbers() -> None:
    sources = ["mixed-more", "mixed-9", "mixed-10", "synthetic-2", "synthetic", "synthetic-10"]
    assert tables.in_order(sources[::-1]) == [*sources[4:5], "synthetic-2", "synthetic-10", *sources[:3]]


def test_every_reason_has_words() -> None:
    assert set(tables.REASON_WORDS) == set(REASONS)


def test_cells_hold_mean_sample_deviation_and_values(results_of: Callable[..., pd.DataFrame]) -> None:
    results = results_of()
    mine = (results["task"] == "digits") & (results["source"] == "synthetic") & (results["scale"] == 100)
    values = results.loc[mine & (results["metric"] == "zero_shot_accuracy"), "value"].tolist()
    cell = next(
        row
        for row in tables.cells(results)
        if (row["task"], row["source"], row["scale"], row["metric"])
        == ("digits", "synthetic", 100, "zero_shot_accuracy")
    )
    assert cell["values"] == values
    assert (cell["mean"], cell["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))


def test_validation_scores_are_not_shown_as_test_scores(results_of: Callable[..., pd.DataFrame]) -> None:
    results = results_of()
    both = pd.concat([results, results.assign(split="val", value=0.99)])
    assert tables.cells(both) == tables.cells(results)


def test_curation_conserves_candidates(tmp_path: Path, make_set: Callable[..., None]) -> None:
    make_set(tmp_path / "set", "textures", "retrieved", 10)
    [row] = tables.curation([load_image_set(tmp_path / "set")])
    assert row["candidates"] == 80
    assert row["kept"] + sum(row["reasons"].values()) == 80
    assert row["reasons"]["dead_link"] == 8
    assert row["fewest"] <= row["kept"] / 8
    assert row["label"] == "retrieved"


def test_a_set_of_one_strength_is_labelled_with_it(tmp_path: Path, make_set: Callable[..., None]) -> None:
    make_set(tmp_path / "set", "textures", "perturbed", 1, 0.4)
    assert tables.label_of(load_image_set(tmp_path / "set")) == "perturbed 0.4"


def test_costs_count_each_trial_once_and_keep_shared_work_apart(results_of: Callable[..., pd.DataFrame]) -> None:
    stages = [
        {
            "stage": "retrieve",
            "task": "digits",
            "source": "retrieved",
            "wall_seconds": 2.0,
            "images": 10,
            "device": "cpu",
        },
        {
            "stage": "retrieve",
            "task": "textures",
            "source": "retrieved",
            "wall_seconds": 3.0,
            "images": 20,
            "peak_memory_gib": 0.5,
        },
        {
            "stage": "prepare",
            "task": None,
            "source": None,
            "wall_seconds": 7.0,
            "images": None,
            "peak_memory_gib": None,
        },
    ]
    table = tables.costs(results_of(), stages).set_index(["source", "stage"])
    assert table.loc[("retrieved", "retrieve"), ["seconds", "images", "memory_gib"]].tolist() == [5.0, 30, 0.5]
    assert table.loc[("retrieved", "finetune"), "seconds"] == 27 * 4.0  # two metrics of 27 trials
    assert table.loc[("shared", "prepare"), "seconds"] == 7.0
    assert np.isnan(table.loc[("shared", "prepare"), "memory_gib"])


@given(st.lists(st.tuples(st.text(max_size=20), st.floats(allow_nan=False)), min_size=1, max_size=5))
def test_csv_holds_no_formula_and_loses_nothing(cells: list[tuple[str, float]]) -> None:
    frame = pd.DataFrame(cells, columns=["task", "value"])
    text = tables.results_csv(frame).decode()
    read = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert [(task.removeprefix("'"), float(value)) for task, value in read] == cells
    assert not any(task.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\0")) for task, _ in read)


def test_csv_has_the_columns_and_rows_of_the_results(results_of: Callable[..., pd.DataFrame]) -> None:
    results = results_of()
    read = pd.read_csv(io.BytesIO(tables.results_csv(results[list(COLUMNS)])), float_precision="round_trip")
    pd.testing.assert_frame_equal(read, results[list(COLUMNS)])
