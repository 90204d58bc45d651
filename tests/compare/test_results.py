"""Rows of `results.parquet`: one a measurement, those under shift beside those on the own test images."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from retrieve_or_generate.compare.plan import TrialPlan
from retrieve_or_generate.compare.results import write_results
from retrieve_or_generate.store import write_json

OWN = {"n_train": 8, "n_test": 30, "wall_seconds": 1.5, "device": "cpu", "metrics": {"zero_shot_accuracy": 0.6}}


def test_each_shift_has_rows_of_its_own(tmp_path: Path) -> None:
    trial = TrialPlan("birds", "retrieved", 8, 0, {})
    all_classes = {"n_test": 9, "classes": 3, "metrics": {"zero_shot_accuracy": 0.5}}
    two = {"n_test": 4, "classes": 2, "metrics": {"zero_shot_accuracy": 0.75}}
    two |= {"test_n": 20, "test_metrics": {"zero_shot_accuracy": 0.8}}
    result = OWN | {"shifts": {"drawn": all_classes, "two": two}}
    write_json(tmp_path / "trials" / trial.name / "result.json", result)
    write_results(tmp_path, [trial])
    table = pq.read_table(tmp_path / "results.parquet").to_pandas()
    rows = list(table[["split", "n_test", "value"]].itertuples(index=False, name=None))
    assert rows == [("test", 30, 0.6), ("drawn", 9, 0.5), ("two", 4, 0.75), ("test/two", 20, 0.8)]
    assert set(table["n_train"]) == {8}
