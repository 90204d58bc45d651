"""A whole comparison on a task with a shifted test set, and the same without: shifts add rows and change nothing else."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate.compare import compare
from retrieve_or_generate.experiment import Experiment, load_experiment
from retrieve_or_generate.finetune import read_trial
from retrieve_or_generate.store import read_json

_CELL = ["source", "scale", "seed", "metric"]


def _experiment(task: str) -> Experiment:
    small = ("scales=[8]", "seeds=1", "sources=[none,retrieved]", "retrieve.k=12", "retrieve.candidates_per_class=12")
    tuned = ("curate.keep_fraction=0.5", "finetune.updates=2", "finetune.batch_size=8")
    return load_experiment(None, (f"tasks=[{task}]", *small, *tuned))


@pytest.mark.slow
def test_shifts_add_rows_and_change_nothing_else(tmp_path: Path) -> None:
    again = tmp_path / "textures"  # called as the plain task, so that nothing is drawn otherwise
    again.mkdir()
    (again / "task.yaml").write_text("extends: textures-shifted\n")
    compare(_experiment("textures"), tmp_path / "plain", jobs=1)
    compare(_experiment(str(again / "task.yaml")), tmp_path / "shifted", jobs=1)
    plain, shifted = (pq.read_table(tmp_path / run / "results.parquet").to_pandas() for run in ("plain", "shifted"))
    assert set(plain["split"]) == {"test"}
    assert set(shifted["split"]) == {"test", "faint"}
    own = shifted[shifted["split"] == "test"]
    pd.testing.assert_series_equal(own.set_index(_CELL)["value"], plain.set_index(_CELL)["value"])
    faint = shifted[shifted["split"] == "faint"].set_index(_CELL)
    assert set(faint.index) == set(own.set_index(_CELL).index)
    assert set(faint["n_test"]) == {320}
    trial = read_trial(tmp_path / "shifted" / "trials" / str(faint["trial"].iloc[0]))
    assert trial is not None
    assert trial.shifted_predictions("faint").num_rows == 320
    assert 'id="shift"' in (tmp_path / "shifted/report.html").read_text()
    assert {row["task"] for row in read_json(tmp_path / "shifted/verdict.json")["shifts"]} == {"textures"}
