"""Shifted test sets: what is said of them, among the classes that they show, and that they change nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from colours import coloured

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune import (
    LabelledImages,
    Measured,
    TaskImages,
    TrialOutcome,
    finetune,
    metrics_of,
    read_trial,
    write_trial,
)
from retrieve_or_generate.finetune.measured import shift_record
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import FinetuneSettings

CONFIG = {"task": "colours", "source": "none"}


def _measured(labels: list[int], logits: list[list[float]], p: list[list[float]]) -> Measured:
    images = LabelledImages(np.zeros((len(labels), 3, 1, 1), np.uint8), np.array(labels), tuple(map(str, labels)))
    return Measured(images, np.array(logits, np.float32), np.array(p, np.float32))


def test_the_choice_is_among_the_classes_that_a_shift_shows() -> None:
    """Class 1 has the best score of both images and no image: among 0 and 2, one use of the model has both right, one has one."""
    shift = _measured([0, 2], [[1, 9, 0], [0, 9, 2]], [[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])
    assert shift.classes.tolist() == [0, 2]
    numbers = shift.metrics_among(shift.classes)
    assert (numbers["zero_shot_accuracy"], numbers["linear_probe_accuracy"]) == (1.0, 0.5)
    assert numbers["linear_probe_mean_per_class_accuracy"] == 0.5
    confidence = np.array([0.6, 0.75])  # 0.3 of 0.2 + 0.3, wrong; 0.3 of 0.1 + 0.3, right
    assert numbers["linear_probe_ece"] == pytest.approx((confidence[0] + 1 - confidence[1]) / 2, abs=1e-6)
    predicted = shift.predictions(shift.classes)
    assert (predicted["zero_shot"].tolist(), predicted["linear_probe"].tolist()) == ([0, 2], [2, 2])


def test_among_all_classes_nothing_is_restricted() -> None:
    whole = _measured([0, 1, 2], np.eye(3).tolist(), (np.eye(3) * 0.7 + 0.1).tolist())
    assert whole.metrics_among(whole.classes) == metrics_of(
        whole.images.labels, whole.zero_shot_logits, whole.linear_probe_probabilities
    )


def test_a_probe_that_is_sure_of_a_class_that_is_not_shown_has_no_number_lost() -> None:
    shift = _measured([0, 1], [[1, 0, 5], [0, 1, 5]], [[0, 0, 1], [0, 0, 1]])
    assert shift.metrics_among(shift.classes)["linear_probe_accuracy"] == 0.5  # a tie goes to the smaller id


def test_own_test_images_of_the_same_classes_stand_beside() -> None:
    own = _measured([0, 1, 2], [[1, 9, 0], [0, 9, 0], [9, 0, 1]], np.eye(3).tolist())
    shift = _measured([0, 2, 2], [[1, 9, 0]] * 3, [[0.4, 0.1, 0.5]] * 3)
    record = shift_record(own, shift)
    assert (record["n_test"], record["classes"], record["test_n"]) == (3, 2, 2)
    told = record["test_metrics"]
    assert isinstance(told, dict)
    assert (told["zero_shot_accuracy"], told["linear_probe_accuracy"]) == (0.5, 1.0)
    assert "test_metrics" not in shift_record(own, own)


@pytest.fixture(scope="module")
def shifted(task: TaskImages) -> TaskImages:
    two = coloured(20, seed=5, classes=2)
    return dataclasses.replace(task, shifts={"copy": task.test, "two": two})


@pytest.fixture(scope="module")
def outcome(clip: Clip, shifted: TaskImages, train: LabelledImages) -> TrialOutcome:
    return finetune(clip, train, shifted, FinetuneSettings(updates=4, batch_size=8), seed=1)


def test_shifts_are_measured_by_what_validation_chose_and_change_nothing(
    clip: Clip, task: TaskImages, train: LabelledImages, outcome: TrialOutcome
) -> None:
    without = finetune(clip, train, task, FinetuneSettings(updates=4, batch_size=8), seed=1)
    assert without.metrics == outcome.metrics
    assert without.history == outcome.history
    assert (without.zero_shot_logits == outcome.zero_shot_logits).all()
    copy = outcome.shifts["copy"]
    assert (copy.zero_shot_logits == outcome.zero_shot_logits).all()
    assert (copy.linear_probe_probabilities == outcome.linear_probe_probabilities).all()
    assert copy.metrics_among(copy.classes) == outcome.metrics


def test_a_trial_keeps_numbers_and_predictions_of_each(tmp_path: Path, outcome: TrialOutcome) -> None:
    written = write_trial(tmp_path, CONFIG, outcome)
    read = read_trial(tmp_path, CONFIG)
    assert read is not None
    assert read.shifts == written.shifts
    assert list(read.shifts) == ["copy", "two"]
    assert read.shifts["copy"]["metrics"] == read.metrics
    table = read.shifted_predictions("two")
    logits = table["zero_shot_logits"].combine_chunks().flatten().to_numpy().reshape(20, 3)
    assert (table["zero_shot"].to_numpy() == logits[:, :2].argmax(1)).all()
    right = np.mean(table["zero_shot"].to_numpy() == table["label"].to_numpy())
    assert right == read.shifts["two"]["metrics"]["zero_shot_accuracy"]
    (tmp_path / "predictions-two.parquet").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"predictions-two.parquet"):
        read_trial(tmp_path, CONFIG)


def test_a_shift_that_does_not_fit_is_named(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    odd = dataclasses.replace(task, shifts={"dusk": LabelledImages(np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 1]))})
    with pytest.raises(UsageError, match=r"dusk images are \(3, 8, 8\), but the model takes \(3, 32, 32\)"):
        finetune(clip, train, odd, seed=1)
