"""Synthetic and perturbed image sets: the numbers of the set they match, the same curation, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from retrieve_or_generate.curate.curation import curate
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter
from retrieve_or_generate.models import Clip
from retrieve_or_generate.synthesize import Generator, perturb, synthesize
from retrieve_or_generate.tasks import Task, load_task

from .conftest import HALF, QUICK


def test_the_same_classes_in_the_same_numbers(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    made = synthesize(task, retrieved, generator, clip, tmp_path / "s", QUICK, HALF, lambda *done: told.append(done))
    assert made.counts().tolist() == retrieved.counts().tolist()
    assert set(made.manifest["source"]) == {"synthetic"}
    images = [done for what, *done in told if what == "synthetic images"]
    assert images[-1] == [len(made.manifest)] * 2
    origin = json.loads(made.manifest["origin"][0])
    assert origin == {"generator": generator.name, "seed": origin["seed"], "prompt": {"template": task.templates[0]}}


def test_a_second_call_opens_what_is_there(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    def run(batch_size: int) -> dict[str, int]:
        settings = QUICK.model_copy(update={"batch_size": batch_size})
        synthesize(task, retrieved, generator, clip, tmp_path / "s", settings, HALF)
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}

    assert run(64) == run(8)  # batch size is no part of what identifies a set


def test_a_finished_folder_of_other_settings_is_refused(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    perturb(task, retrieved, generator, clip, tmp_path, 0.5, QUICK, HALF, first=1)
    with pytest.raises(UsageError, match="holds a finished image set; choose another --out"):
        perturb(task, retrieved, generator, clip, tmp_path, 0.6, QUICK, HALF, first=1)


def test_perturbed_images_keep_key_label_and_origin(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    made = perturb(task, retrieved, generator, clip, tmp_path, 0.5, QUICK, HALF)
    assert np.array_equal(made.counts(), retrieved.counts())
    both = made.manifest.merge(retrieved.manifest, on="key", suffixes=("", "_before"))
    assert len(both) == len(made.manifest) == len(retrieved.manifest)
    assert (both["label"] == both["label_before"]).all()
    assert (made.manifest["strength"] == 0.5).all()
    assert [json.loads(origin)["init_key"] for origin in made.manifest["origin"]] == made.manifest["key"].tolist()


def test_what_does_not_fit_is_refused(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="an image set of task 'textures', not of 'digits'"):
        synthesize(load_task("digits"), retrieved, generator, clip, tmp_path / "a", QUICK, HALF)
    with pytest.raises(UsageError, match=r"strength 1.5: a number from 0 to 1"):
        perturb(task, retrieved, generator, clip, tmp_path / "b", 1.5, QUICK, HALF)
    assert not any(tmp_path.iterdir())


def test_a_class_that_the_retrieved_set_leaves_out_is_left_out_by_what_follows_it(
    task: Task, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    exclude = HALF.model_copy(update={"on_short_class": "exclude"})
    train, out = task.split("train"), 1
    names = {"task": task.name, "source": "retrieved", "class_names": task.class_names}
    with ImageSetWriter(tmp_path / "r", key="k", config={}, **names) as writer:  # type: ignore[arg-type]
        for label in range(len(task.class_names)):
            if label != out:
                row = int(np.flatnonzero(train.labels == label)[0])
                writer.add(key=f"{row:06d}", label=label, caption="", origin={}, query="", image=train.images[row])
        writer.finish()
    retrieved = curate(tmp_path / "r", task=task, clip=clip, settings=exclude)
    made = synthesize(task, retrieved, generator, clip, tmp_path / "s", QUICK, HALF)
    changed = perturb(task, retrieved, generator, clip, tmp_path / "p", 0.5, QUICK, HALF)
    for image_set in (retrieved, made, changed):
        assert image_set.excluded == (task.class_names[out],)
        assert image_set.counts()[out] == 0
        assert image_set.class_names == task.class_names


def test_weights_that_are_not_there_are_told_of_before_anything_is_generated(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    learned = HALF.model_copy(update={"descriptor": "nowhere.pt"})
    with pytest.raises(UsageError, match=r"curate\.descriptor: nowhere\.pt: no such file"):
        synthesize(task, retrieved, generator, clip, tmp_path / "s", QUICK, learned)
    with pytest.raises(UsageError, match=r"curate\.descriptor: nowhere\.pt: no such file"):
        perturb(task, retrieved, generator, clip, tmp_path / "p", 0.5, QUICK, learned)
    assert not any(tmp_path.iterdir())
