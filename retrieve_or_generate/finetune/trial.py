"""A trial: what it measured, and the folder that keeps it so that every number can be computed again.

`write_trial` writes `config.json` (what identifies the trial), `metrics.jsonl` (one line a look at validation, then one for each
choice), `predictions.parquet` (one row a test image: key, label, logits and probe probabilities), `predictions-NAME.parquet` of
each shifted test set, and last `result.json`: the numbers, and the size and sha256 of the other files, among them those of the
model where it is kept (`finetune/saved.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from retrieve_or_generate.finetune.data import LabelledImages
from retrieve_or_generate.finetune.measured import Measured, shift_record
from retrieve_or_generate.store import (
    content_key,
    durable_file,
    read_json,
    read_seal,
    remove_leftovers,
    seal,
    write_bytes,
    write_json,
)

CONFIG, RESULT, MODEL = "config.json", "result.json", "model"


@dataclass(frozen=True)
class TrialOutcome:
    """What one trial measured on `test` and on the task's `shifts`, and how it came about. `metrics` are shares in [0, 1]."""

    test: LabelledImages
    zero_shot_logits: np.ndarray  # (m, k) float32
    linear_probe_probabilities: np.ndarray  # (m, k) float32
    history: tuple[dict[str, Any], ...]
    n_train: int
    updates: int  # of each learning rate
    images_seen: int
    wall_seconds: float
    stall_seconds: float  # of them, waiting for images to train on
    device: str
    precision: str  # that products were taken in
    processes: int  # that shared the work, on a device each
    model: dict[str, Tensor] = field(repr=False)  # tower and head that validation chose for zero-shot
    shifts: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def own(self) -> Measured:
        """What was measured on the task's own test images."""
        return Measured(self.test, self.zero_shot_logits, self.linear_probe_probabilities)

    @property
    def metrics(self) -> dict[str, float]:
        return self.own.metrics_among(np.arange(self.zero_shot_logits.shape[1]))

    @property
    def zero_shot_accuracy(self) -> float:
        return self.metrics["zero_shot_accuracy"]

    @property
    def linear_probe_accuracy(self) -> float:
        return self.metrics["linear_probe_accuracy"]


@dataclass(frozen=True)
class Trial:
    """A finished trial folder: its configuration, its numbers, and the rest of what `result.json` says."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, float]
    record: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def model(self) -> Path | None:
        """The folder of the fine-tuned model, where it was kept."""
        return self.folder / MODEL if any(name.startswith(f"{MODEL}/") for name in self.record["files"]) else None

    @property
    def predictions(self) -> pa.Table:
        return pq.read_table(self.folder / "predictions.parquet")

    @property
    def shifts(self) -> dict[str, dict[str, Any]]:
        """What `measured.shift_record` says of each shifted test set."""
        return dict(self.record.get("shifts", {}))

    def shifted_predictions(self, shift: str) -> pa.Table:
        """As `predictions`, of the images of `shift`; the predicted classes are among those that it shows."""
        return pq.read_table(self.folder / _shift_file(shift))


def write_trial(folder: Path, config: dict[str, Any], outcome: TrialOutcome, *, model: Sequence[Path] = ()) -> Trial:
    """Make `folder` a finished trial. `config` is JSON-like and holds all that the outcome follows from, no path and no date.

    `model` are files of the fine-tuned model that lie in `folder` already, and now belong to the trial.
    """
    write_json(folder / CONFIG, config)
    lines = [json.dumps(row, sort_keys=True, allow_nan=False) for row in outcome.history]
    write_bytes(folder / "metrics.jsonl", ("\n".join(lines) + "\n").encode())
    every = np.arange(outcome.zero_shot_logits.shape[1])
    tables = {"predictions.parquet": _predictions(outcome.own, every)}
    tables |= {_shift_file(name): _predictions(shift, shift.classes) for name, shift in outcome.shifts.items()}
    for name, table in tables.items():
        with durable_file(folder / name) as path:
            pq.write_table(table, path)
    files = [*(folder / name for name in (CONFIG, "metrics.jsonl", *tables)), *model]
    shifts = {name: shift_record(outcome.own, shift) for name, shift in outcome.shifts.items()}
    record = seal(
        folder,
        RESULT,
        content_key(config),
        files,
        metrics=outcome.metrics,
        n_train=outcome.n_train,
        n_test=len(outcome.test),
        updates=outcome.updates,
        images_seen=outcome.images_seen,
        wall_seconds=outcome.wall_seconds,
        stall_seconds=outcome.stall_seconds,
        device=outcome.device,
        precision=outcome.precision,
        processes=outcome.processes,
        **({"shifts": shifts} if shifts else {}),
    )
    return Trial(folder, config, record["metrics"], record)


def begin_trial(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` first, by which `is_begun` knows the folder again if this process is killed before the trial is whole."""
    if folder.exists():
        remove_leftovers(folder)
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a process that was killed
    write_json(folder / CONFIG, config)


def is_begun(folder: Path, config: dict[str, Any]) -> bool:
    """Whether `folder` holds an unfinished trial of this `config`, which whoever writes it again may take as its own."""
    if not (folder / CONFIG).is_file() or (folder / RESULT).exists():
        return False
    return content_key(read_json(folder / CONFIG)) == content_key(config)


def read_trial(folder: Path, config: dict[str, Any] | None = None) -> Trial | None:
    """The finished trial in `folder`; None when there is none, or only one of another `config`.

    Raises:
        IntegrityError: a file of it is missing or changed since it was written.
    """
    record = read_seal(folder, RESULT, content_key(config) if config is not None else None)
    if record is None:
        return None
    return Trial(folder, read_json(folder / CONFIG), record["metrics"], record)


def _shift_file(name: str) -> str:
    return f"predictions-{name}.parquet"


def _predictions(measured: Measured, classes: np.ndarray) -> pa.Table:
    """A row for each image; what is predicted is one of `classes`, the scores are of all."""
    test = measured.images
    columns = {
        "key": pa.array(test.keys or [f"{row:06d}" for row in range(len(test))]),
        "label": pa.array(test.labels),
        **{name: pa.array(predicted) for name, predicted in measured.predictions(classes).items()},
        "zero_shot_logits": _lists(measured.zero_shot_logits),
        "linear_probe_probabilities": _lists(measured.linear_probe_probabilities),
    }
    return pa.table(columns)


def _lists(values: np.ndarray) -> pa.Array:
    """(m, k) float32 as m lists of k numbers."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), values.shape[1])
