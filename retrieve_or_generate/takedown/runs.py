"""Runs whose image sets changed: what followed from the image is withdrawn, so that `rog compare` makes it anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from retrieve_or_generate.compare.folder import DERIVED, ENVIRONMENT, EXPERIMENT, SEAL, inputs_key, load_tasks
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import load_experiment
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.store import read_json, write_json

_PENDING = ".takedown.json"
_MADE_OF_RESULTS = ("results.parquet", *DERIVED)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    return sorted({path.parent.resolve() for folder in folders for path in folder.rglob(EXPERIMENT)})


def withdraw(runs: Sequence[Path], sets: Sequence[Path]) -> list[Path]:
    """Unseal the runs that hold one of these sets, and drop their results and report, which shows pictures; those runs."""
    touched = [run for run in runs if any(image_set.is_relative_to(run) for image_set in sets)]
    for run in touched:
        for name in (SEAL, *_MADE_OF_RESULTS):
            (run / name).unlink(missing_ok=True)
        shutil.rmtree(run / "figures", ignore_errors=True)
    return touched


@contextmanager
def same_inputs(runs: Sequence[Path], pool: Pool) -> Iterator[None]:
    """While the pool changes: runs that were begun with it as it was are afterwards as if begun with it as it is.

    Each says so itself until that is done, for a takedown that is killed.
    """
    for run in runs:
        if not (run / _PENDING).exists() and (key := _inputs(run, pool)) == _recorded(run):
            write_json(run / _PENDING, {"inputs": key})
    yield
    for run in runs:
        if (run / _PENDING).exists():
            if (key := _inputs(run, pool)) and read_json(run / _PENDING)["inputs"] == _recorded(run):
                write_json(run / ENVIRONMENT, read_json(run / ENVIRONMENT) | {"inputs": key})
            (run / _PENDING).unlink()


def _recorded(run: Path) -> str:
    return str(read_json(run / ENVIRONMENT)["inputs"])


def _inputs(run: Path, pool: Pool) -> str:
    """What names the run's inputs as they are; "" where it is of another pool, or they are not all there."""
    try:
        experiment = load_experiment(run / EXPERIMENT)
        if open_pool(experiment.pool).folder.resolve() != pool.folder.resolve():
            return ""
        return inputs_key(experiment, load_tasks(experiment))
    except UsageError:
        return ""
