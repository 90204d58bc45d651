"""What a run folder holds, read and checked; nothing here is computed anew.

Reads `experiment.yaml`, `environment.json`, `results.parquet`, `stages.json`, `trials/*/result.json` (that they are there) and
the image sets under `sets/<task>/`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.experiment import Experiment, load_experiment
from retrieve_or_generate.image_set import SEAL, ImageSet, load_image_set
from retrieve_or_generate.report.tables import in_order, name_of
from retrieve_or_generate.store import read_json

COLUMNS = (
    "task",
    "source",
    "scale",
    "seed",
    "metric",
    "value",
    "split",
    "n_train",
    "n_test",
    "wall_seconds",
    "device",
    "trial",
)
_IDENTITY = ["task", "source", "scale", "seed", "metric", "split"]


@dataclass(frozen=True)
class Run:
    """One run. `results` has the columns `COLUMNS`; `stages` are rows of {stage, task, source, wall_seconds, images, …}."""

    folder: Path
    experiment: Experiment
    environment: dict[str, Any]
    results: pd.DataFrame
    stages: tuple[dict[str, Any], ...]
    sets: tuple[ImageSet, ...]

    @property
    def pocket(self) -> bool:
        """Whether any part of the pocket world stands behind the numbers."""
        return "pocket" in (self.experiment.pool, self.experiment.model, self.experiment.generator)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the experiment's order; a run that does not record them named them after their folders."""
        return tuple(self.environment.get("tasks") or (Path(task).name for task in self.experiment.tasks))

    @property
    def whole_sets(self) -> tuple[ImageSet, ...]:
        """The sets made to be trained on; not those of a few images that only show further strengths."""
        return tuple(image_set for image_set in self.sets if image_set.record["config"].get("first") is None)

    def missing(self) -> list[str]:
        """Cells of the experiment's grid that have no result, as `task source n=scale seed=seed`."""
        found = set(self.results[["task", "source", "scale", "seed"]].itertuples(index=False, name=None))
        shelf = {task for task, source, *_ in found if source == "none"}
        trained = [source for source in self.experiment.sources if source != "none"]
        grid = itertools.product(self.tasks, trained, self.experiment.scales, range(self.experiment.seeds))
        absent = [
            f"{task} {source} n={scale} seed={seed}"
            for task, source, scale, seed in grid
            if (task, source, scale, seed) not in found
        ]
        shelves = self.tasks if "none" in self.experiment.sources else ()
        return [f"{task} none" for task in shelves if task not in shelf] + absent


def read_results(path: Path) -> pd.DataFrame:
    """`results.parquet`, sorted; `IntegrityError` unless it has exactly `COLUMNS` and measures each thing once."""
    try:
        results = pq.read_table(path).to_pandas()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no results yet; run `rog compare` into this folder first") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from error
    if list(results.columns) != list(COLUMNS):
        raise IntegrityError(f"{path}: columns {list(results.columns)}, expected {list(COLUMNS)}")
    if results.empty:
        raise UsageError(f"{path}: holds no rows; run `rog compare` into this folder again")
    twice = results[results.duplicated(_IDENTITY)]
    if len(twice):
        row = twice.iloc[0]
        raise IntegrityError(f"{path}: {', '.join(f'{name} {row[name]}' for name in _IDENTITY)} is measured twice")
    return results.sort_values(_IDENTITY, ignore_index=True)


def _check_trials(folder: Path, results: pd.DataFrame) -> None:
    """No number without its trial: each named in the results must have ended."""
    for trial in sorted(set(results["trial"])):
        if not trial or Path(trial).name != trial:
            raise IntegrityError(f"{folder}: results.parquet names the trial {trial!r}, which is no folder name")
        if not (folder / "trials" / trial / "result.json").is_file():
            raise IntegrityError(f"{folder / 'trials' / trial}: no result.json, but results.parquet holds its numbers")


def _sets(folder: Path) -> tuple[ImageSet, ...]:
    """The finished image sets of the run: by source, a source's sets by folder name."""
    sets = [load_image_set(path.parent) for path in sorted((folder / "sets").glob(f"*/*/{SEAL}"))]
    order = in_order(map(name_of, sets))
    return tuple(sorted(sets, key=lambda image_set: order.index(name_of(image_set))))


def open_run(folder: Path) -> Run:
    """Read the run in `folder`. Raises `UsageError` or `IntegrityError`, one line that names the file."""
    if not (folder / "experiment.yaml").is_file():
        raise UsageError(f"{folder}: not a run (no experiment.yaml); `rog compare --out {folder}` makes one")
    experiment = load_experiment(folder / "experiment.yaml")
    results = read_results(folder / "results.parquet")
    _check_trials(folder, results)
    environment, stages = read_json(folder / "environment.json"), read_json(folder / "stages.json")
    if not isinstance(environment, dict) or not isinstance(stages, list):
        raise IntegrityError(f"{folder}: environment.json must hold a mapping and stages.json a list")
    return Run(folder, experiment, environment, results, tuple(stages), _sets(folder))
