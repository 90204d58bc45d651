"""Runs whose image sets changed: what followed from the image is withdrawn, so that `rog compare` makes it anew."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from retrieve_or_generate.compare.folder import DERIVED, EXPERIMENT, SEAL

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
