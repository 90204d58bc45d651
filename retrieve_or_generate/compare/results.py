"""Collects what trials stored into `results.parquet`: long form, one row per measurement. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.compare.plan import TrialPlan
from retrieve_or_generate.store import durable_file, read_json, write_json

RESULTS = pa.schema(
    [
        ("task", pa.string()),
        ("source", pa.string()),
        ("scale", pa.int64()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("split", pa.string()),
        ("n_train", pa.int64()),
        ("n_test", pa.int64()),
        ("wall_seconds", pa.float64()),
        ("device", pa.string()),
        ("trial", pa.string()),
    ]
)


def _rows(out: Path, trial: TrialPlan) -> list[dict[str, Any]]:
    result = read_json(out / "trials" / trial.name / "result.json")
    cell = {"task": trial.task, "source": trial.source, "scale": trial.scale, "seed": trial.seed, "trial": trial.name}
    told = {name: result[name] for name in ("n_train", "wall_seconds", "device")}
    return [
        cell | told | {"metric": name, "value": value, "split": split, "n_test": n_test}
        for split, n_test, metrics in _measured(result)
        for name, value in sorted(metrics.items())
    ]


def _measured(result: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Test set, its images and numbers: `test`; each shift by its name; `test/SHIFT`, the own test images of the classes of a shift
    that shows some only.
    """
    yield "test", result["n_test"], result["metrics"]
    for name, shift in result.get("shifts", {}).items():
        yield name, shift["n_test"], shift["metrics"]
        if "test_metrics" in shift:
            yield f"test/{name}", shift["test_n"], shift["test_metrics"]


def write_results(out: Path, trials: Sequence[TrialPlan]) -> None:
    """`results.parquet` of these trials, in their order."""
    table = pa.Table.from_pylist([row for trial in trials for row in _rows(out, trial)], schema=RESULTS)
    with durable_file(out / "results.parquet") as temporary:
        pq.write_table(table, temporary)


def write_stages(out: Path) -> None:
    """`stages.json`: what each image set cost, in order of task and source."""
    write_json(out / "stages.json", [read_json(path) for path in sorted((out / "stages").glob("*.json"))])
