"""How many workers memory bears."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from colours import make_clip

from retrieve_or_generate.compare import compare, workers
from retrieve_or_generate.compare.workers import activation_bytes, fitting_jobs, worker_bytes
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment, load_experiment
from retrieve_or_generate.tasks import load_task

GIB = 1 << 30


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for five workers, eight cores."""
    monkeypatch.setattr(workers, "worker_bytes", lambda *_: 2 * GIB)
    monkeypatch.setattr(workers, "available_bytes", lambda: 11 * GIB)
    monkeypatch.setattr(workers, "core_count", lambda: 8)


@pytest.mark.usefixtures("small_machine")
def test_more_workers_than_memory_is_one_line_that_says_how_many_fit(capsys: pytest.CaptureFixture[str]) -> None:
    told = "a worker takes about 2.0 GiB and 11.0 GiB of memory are free"
    with pytest.raises(UsageError, match=f"^--jobs 6: {told}; --jobs 5 fits$"):
        fitting_jobs(Experiment(), {}, "cpu", 6)
    assert fitting_jobs(Experiment(), {}, "cpu", 5) == 5
    assert capsys.readouterr().err == ""
    assert fitting_jobs(Experiment(), {}, "cpu", None) == 5
    assert capsys.readouterr().err == f"rog: {told}: 5 at a time instead of 8\n"


@pytest.mark.usefixtures("small_machine")
def test_never_are_more_at_work_than_there_are_trials() -> None:
    few = Experiment(tasks=("textures",), sources=("none", "retrieved"), scales=(8, 16), seeds=2)
    assert fitting_jobs(few, {}, "cpu", 64) == 64  # five of them
    with pytest.raises(UsageError, match=r"--jobs 64: .* --jobs 5 fits"):
        fitting_jobs(few.model_copy(update={"seeds": 3}), {}, "cpu", 64)


@pytest.mark.usefixtures("small_machine")
def test_where_none_fits_one_may_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_bytes", lambda: GIB)
    with pytest.raises(UsageError, match=r"choose a smaller finetune\.batch_size or model, or try --jobs 1"):
        fitting_jobs(Experiment(), {}, "cpu", 2)
    monkeypatch.setattr(workers, "worker_bytes", lambda *_: pytest.fail("one worker is not counted"))
    assert fitting_jobs(Experiment(), {}, "cpu", 1) == 1


@pytest.mark.usefixtures("small_machine")
def test_it_is_said_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--jobs 5 fits"):
        compare(load_experiment(None, ("tasks=[textures]",)), tmp_path / "run", jobs=6)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"environment.json", "experiment.yaml", ".lock"}


def test_what_an_image_leaves_on_its_way_is_what_torch_keeps() -> None:
    """Of a network that is known: each product keeps its input, and so does the activation; weights do not count."""
    clip = make_clip()
    clip.network.visual = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 32**2, 100), torch.nn.Tanh(), torch.nn.Linear(100, 7)
    )
    assert activation_bytes(clip) == 4 * (3 * 32**2 + 100)
    assert (
        activation_bytes(make_clip()) > 17 * 4 * 128 * 4 * 4
    )  # 17 tokens, 4 blocks of width 128, more than four tensors each


def test_more_is_reckoned_with_than_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter, and 64 MiB: here of a model alone, on a GPU, without images."""
    monkeypatch.setattr("retrieve_or_generate.models.load_model", lambda name: make_clip())
    monkeypatch.setattr(workers, "own_bytes", lambda: GIB)
    shelf = Experiment(tasks=("textures",), sources=("none",))
    assert workers._needed(shelf, "cuda", ({"textures": [0, 0, 0]}, 8)) == GIB + GIB // 4 + (64 << 20)
    images = workers._needed(shelf, "cuda", ({"textures": [0, 0, 100]}, 8)) - GIB - GIB // 4 - (64 << 20)
    assert images == 1.25 * 100 * (3 * 32**2 + 6 * 4 * (make_clip().embed_dim + 8))


@pytest.mark.slow
def test_what_a_worker_takes_grows_with_the_batch_and_the_scale() -> None:
    def taken(*overrides: str) -> int:
        experiment = load_experiment(None, ("tasks=[textures]", *overrides))
        return worker_bytes(experiment, {"textures": load_task("textures")}, "cpu")

    plain = taken()
    assert 150 << 20 < plain < GIB
    assert taken("finetune.batch_size=2000", "scales=[2000]") > plain + 1000 * (500 << 10)


@pytest.mark.slow
def test_shifted_images_count_as_any() -> None:
    experiment, task = load_experiment(None, ("tasks=[textures]",)), load_task("textures")
    many = SimpleNamespace(read=lambda: task.split("test").take(np.arange(480).repeat(40)))
    shifted = dataclasses.replace(task, shifts={"many": many})
    plain, more = (worker_bytes(experiment, {"textures": each}, "cpu") for each in (task, shifted))
    assert more > plain + 480 * 40 * 3 * 32**2
