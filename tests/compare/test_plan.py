"""The grid: a class that one source leaves out is left out of all, by name, and labels stay the task's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.compare.drawn import mixed_quotas
from retrieve_or_generate.compare.plan import check_scales, plan_trial, plan_trials
from retrieve_or_generate.curate.balance import class_quotas
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment, Variant, parse_experiment
from retrieve_or_generate.settings import MixSettings
from retrieve_or_generate.tasks import Task


class _Named(Task):
    fingerprint = "f"

    @property
    def shift_fingerprints(self) -> dict[str, str]:  # type: ignore[override]
        return dict.fromkeys(self.shifts, "d")


TASK = _Named("birds", ("jay", "rook", "wren"), ("{}",), Path("birds"))
GRID = Experiment(tasks=("birds",), sources=("none", "retrieved", "synthetic"), scales=(4,), seeds=1)


def _set(counts: list[int], excluded: tuple[str, ...] = ()) -> Any:
    record = {"files": {"manifest.parquet": {"sha256": str(counts)}}}
    source = "synthetic" if counts[0] == 4 else "retrieved"
    names = ("jay", "rook", "wren")
    return SimpleNamespace(
        source=source, class_names=names, counts=lambda: np.array(counts), excluded=excluded, record=record
    )


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


def test_a_key_follows_from_every_setting_that_changes_a_number() -> None:
    def planned(**finetune: Any) -> Any:
        grid = parse_experiment({"tasks": ["birds"], "sources": ["none"], "finetune": finetune})
        return plan_trials(grid, {"birds": TASK}, {}, "weights")[0]

    plain = planned()
    assert planned(preprocess="square", flip=False, compile=True, checkpoint_every=3).key == plain.key
    changed = [
        planned(**{name: value}) for name, value in (("flip", True), ("preprocess", "paper"), ("working_size", 256))
    ]
    assert len({trial.key for trial in [plain, *changed]}) == 4


def test_shifts_are_part_of_what_a_trial_is_and_of_nothing_else() -> None:
    grid = parse_experiment({"tasks": ["birds"], "sources": ["none"]})
    attached = dataclasses.replace(TASK, shifts={"drawn": SimpleNamespace()})
    without, trial = (plan_trials(grid, {"birds": task}, {}, "weights")[0] for task in (TASK, attached))
    assert without.config["task"] == {"name": "birds", "fingerprint": "f", "shifts": {}}
    assert trial.config["task"] == without.config["task"] | {"shifts": {"drawn": "d"}}
    assert trial.seed_value == without.seed_value
    assert trial.key != without.key


MIXED = Experiment(
    tasks=("birds",),
    sources=("retrieved", "synthetic", "mixed-half", "mixed-more", "mixed-weighed"),
    variants={
        "mixed-half": Variant(mix=MixSettings(of=("retrieved", "synthetic"))),
        "mixed-more": Variant(mix=MixSettings(of=("retrieved", "synthetic"), counts=(5, None))),
        "mixed-weighed": Variant(mix=MixSettings(of=("synthetic", "retrieved"), share=0.25, gamma=0.3)),
    },
    scales=(4, 8),
    seeds=1,
)


def test_mixtures_draw_from_two_sets_by_share_or_by_count() -> None:
    sets = {("birds", "retrieved"): _set([5, 5, 5]), ("birds", "synthetic"): _set([4, 4, 4])}
    trials = {(trial.source, trial.scale): trial for trial in plan_trials(MIXED, {"birds": TASK}, sets, "clip")}
    assert len(trials) == 10
    assert trials["retrieved", 8].parts == {"retrieved": (3, 3, 2)}
    half = trials["mixed-half", 8]
    assert half.parts == {"retrieved": (1, 2, 1), "synthetic": (2, 1, 1)}
    assert half.quotas == trials["retrieved", 8].quotas
    assert half.config["image_sets"] == {"retrieved": str([5, 5, 5]), "synthetic": str([4, 4, 4])}
    assert half.seed_value == trials["retrieved", 8].seed_value
    assert trials["mixed-more", 4].parts == {"retrieved": (2, 2, 1), "synthetic": (2, 1, 1)}
    assert sum(trials["mixed-more", 8].quotas) == 13
    weighed = trials["mixed-weighed", 8]
    assert list(weighed.parts) == ["synthetic", "retrieved"]
    assert weighed.config["mix"]["gamma"] == 0.3
    assert len({trial.key for trial in trials.values()}) == 10


def test_a_count_that_a_source_does_not_have_is_one_line() -> None:
    sets = {("birds", "retrieved"): _set([1, 1, 1]), ("birds", "synthetic"): _set([4, 4, 4])}
    grid = MIXED.model_copy(update={"scales": (3,)})
    with pytest.raises(UsageError, match="scale 5: class by class the sources retrieved share only 3 images"):
        plan_trials(grid, {"birds": TASK}, sets, "clip")


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(1, 200))
def test_a_share_divides_every_class_and_larger_scales_hold_smaller_ones(
    available: list[int], share: float, scale: int
) -> None:
    names = [str(number) for number in range(len(available))]
    counts = {"a": np.array(available), "b": np.array(available)}
    before = {"a": np.zeros(len(available), int), "b": np.zeros(len(available), int)}
    for size in sorted({min(scale, sum(available)), sum(available)}):
        quotas = class_quotas(counts, size, names)
        parts = mixed_quotas(MixSettings(of=("a", "b"), share=share), quotas, counts, names)
        assert (parts["a"] + parts["b"] == quotas).all()
        assert (abs(parts["a"] - share * quotas) < 1).all()
        assert all((parts[one] >= before[one]).all() for one in parts)
        before = parts


@pytest.mark.parametrize("scale", [3, 50, 150, 160, 299])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_share_is_that_of_the_whole_too_where_classes_have_one_or_two_images(scale: int, share: float) -> None:
    names, counts = [str(number) for number in range(100)], {one: np.full(100, 3) for one in "ab"}
    quotas = class_quotas(counts, scale, names)
    parts = mixed_quotas(MixSettings(of=("a", "b"), share=share), quotas, counts, names)
    assert abs(parts["a"].sum() - share * scale) <= 2


@pytest.mark.parametrize("scale", [None, 7])
def test_one_trial_is_planned_as_the_grid_would(scale: int | None) -> None:
    found, made = _set([5, 5, 5]), _set([4, 4, 4])
    shelf, alone, _ = _plan(found, made)
    assert plan_trial(GRID, TASK, [found], "clip", 4) == alone
    assert plan_trial(GRID, TASK, [], "clip", seed=2) == shelf
    mixed = plan_trial(GRID, TASK, [found, made], "clip", scale, gamma=0.5)
    assert mixed.source == "mixed"
    assert (mixed.scale, sum(mixed.quotas)) == ((scale, scale) if scale else (27, 27))
    assert list(mixed.parts) == ["retrieved", "synthetic"]
    twice = plan_trial(GRID, TASK, [found, _set([6, 6, 6])], "clip", scale)
    assert list(twice.parts) == ["retrieved-1", "retrieved-2"]


def test_where_nothing_is_mixed_the_key_knows_nothing_of_mixtures() -> None:
    for trial in _plan(_set([5, 5, 5]), _set([5, 5, 5])):
        assert not {"mix", "parts", "image_sets"} & trial.config.keys()
        assert "checkpoint_every" not in trial.config["finetune"]


@pytest.mark.parametrize(
    ("sets", "gamma", "words"),
    [
        (([5], [4], [3]), None, "one image set to train on, or two different ones to mix"),
        (([5], [5]), None, "two different ones"),
        (([5],), 0.5, "gamma 0.5: it weighs the losses of two image sets"),
        (([5], [4]), 1.0, "gamma 1: .* lies between 0 and 1"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(sets: tuple[list[int], ...], gamma: float | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_trial(GRID, TASK, [_set(one * 3) for one in sets], "clip", gamma=gamma)


def test_a_scale_of_no_set_is_not_passed_over() -> None:
    with pytest.raises(UsageError, match="scale 5: images of a set; give one to train on"):
        plan_trial(GRID, TASK, [], "clip", 5)


def test_a_count_beyond_the_retrieved_set_is_said_before_anything_is_generated() -> None:
    check_scales(MIXED, {"birds": TASK}, {"birds": _set([3, 3, 2])})
    more = MIXED.model_copy(update={"scales": (2,), "sources": ("retrieved", "synthetic", "mixed-more")})
    with pytest.raises(UsageError, match=r"scale 5: .* share only 3 images"):
        check_scales(more, {"birds": TASK}, {"birds": _set([1, 1, 1])})


def test_a_set_of_other_classes_is_one_line() -> None:
    other = _set([5, 5, 5])
    other.class_names, other.folder = ("jay", "wren", "rook"), Path("sets/owls")
    with pytest.raises(UsageError, match=r"sets/owls: its 3 classes are not the 3 of task 'birds'; give the task"):
        plan_trial(GRID, TASK, [other], "clip")
