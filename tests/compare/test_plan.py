"""The grid: a class that one source leaves out is left out of all, by name, and labels stay the task's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retrieve_or_generate.compare.plan import check_scales, plan_trials
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment, parse_experiment
from retrieve_or_generate.tasks import Task


class _Named(Task):
    fingerprint = "f"
    shift_fingerprints = {"drawn": "d"}  # noqa: RUF012


TASK = _Named("birds", ("jay", "rook", "wren"), ("{}",), Path("birds"))
GRID = Experiment(tasks=("birds",), sources=("none", "retrieved", "synthetic"), scales=(4,), seeds=1)


def _set(counts: list[int], excluded: tuple[str, ...] = ()) -> Any:
    record = {"files": {"manifest.parquet": {"sha256": str(counts)}}}
    return SimpleNamespace(counts=lambda: np.array(counts), excluded=excluded, record=record)


def _plan(retrieved: Any, synthetic: Any) -> list[Any]:
    return plan_trials(
        GRID, {"birds": TASK}, {("birds", "retrieved"): retrieved, ("birds", "synthetic"): synthetic}, "clip"
    )


def test_an_exclusion_holds_for_every_source_and_is_named() -> None:
    trials = _plan(_set([5, 5, 5]), _set([5, 0, 5], ("rook",)))
    assert [trial.quotas for trial in trials] == [(), (2, 0, 2), (2, 0, 2)]
    assert [trial.config.get("excluded") for trial in trials] == [None, ["rook"], ["rook"]]


def test_without_exclusions_nothing_is_said_of_them() -> None:
    trials = _plan(_set([5, 5, 5]), _set([5, 5, 5]))
    assert {trial.quotas for trial in trials} == {(), (2, 1, 1)}
    assert all("excluded" not in trial.config for trial in trials)


def test_a_scale_that_the_other_classes_cannot_fill_names_who_is_left_out() -> None:
    with pytest.raises(UsageError, match=r"share only 3 images \(fewest of 'wren': 1 in retrieved; left out: rook\)"):
        check_scales(GRID, {"birds": TASK}, {"birds": _set([2, 0, 1], ("rook",))})


def test_trials_follow_from_the_model_that_is_fine_tuned() -> None:
    def planned(**finetune: Any) -> Any:
        grid = parse_experiment({"tasks": ["birds"], "sources": ["none"], "finetune": finetune})
        return plan_trials(grid, {"birds": TASK}, {}, "weights")[0]

    own, another = planned(), planned(model="timm:resnet50")
    assert own.config["model"] == {"name": "pocket", "fingerprint": "weights"}
    assert another.config["model"] == {"name": "timm:resnet50", "fingerprint": "weights"}
    assert planned(model="pocket").key == own.key != another.key


def test_shifts_are_part_of_what_a_trial_is_and_of_nothing_else() -> None:
    grid = parse_experiment({"tasks": ["birds"], "sources": ["none"]})
    attached = dataclasses.replace(TASK, shifts={"drawn": SimpleNamespace()})
    without, trial = (plan_trials(grid, {"birds": task}, {}, "weights")[0] for task in (TASK, attached))
    assert without.config["task"] == {"name": "birds", "fingerprint": "f"}
    assert trial.config["task"] == without.config["task"] | {"shifts": {"drawn": "d"}}
    assert trial.seed_value == without.seed_value
    assert trial.key != without.key
