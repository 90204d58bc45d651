"""One suite over every kind of task: the layouts that are published, the pocket world, and what a task.yaml describes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.tasks import SPLITS, Split, Task, load_task, task_names
from retrieve_or_generate.tasks.check import check_task
from retrieve_or_generate.tasks.split import Images
from tests.tasks.miniatures import KINDS, NAMES, TEMPLATES

PUBLISHED = ("dtd", "fgvc_aircraft", "stanford_cars", "flowers102", "imagenet", "whole_imagenet")
OWN = [kind for kind in KINDS if kind not in PUBLISHED]


@dataclass(frozen=True)
class Made:
    """A task of one kind, and how to read it again where it lies or from a copy of its files."""

    kind: str
    name: str
    folder: Path | None

    def task(self) -> Task:
        return load_task(self.name)


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(kind, marks=pytest.mark.slow if kind == "whole_imagenet" else ()) for kind in KINDS),
        *task_names(),
    ],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    kind = request.param
    if kind in task_names():
        yield Made(kind, kind, None)
        return
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(kind)
        yield Made(kind, KINDS[kind](folder, patch), folder)


def everything(task: Task) -> dict[str, Split]:
    return {name: task.split(name) for name in SPLITS}


def test_splits_are_whole(made: Made) -> None:
    task = made.task()
    for split in everything(task).values():
        assert len(split) == len(split.keys) == len(split.images) == len(split.labels) == len(set(split.keys)) > 0
        assert split.labels.dtype == np.int64
        assert set(split.labels.tolist()) <= set(range(len(task.class_names)))
        assert split.decoded(8, [0, len(split) - 1]).shape == (2, 3, 8, 8)
    assert set(task.split("test").labels.tolist()) == set(range(len(task.class_names)))


def test_images_are_a_sequence_that_is_read_when_asked(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    images = made.task().split("train").images
    assert isinstance(images, Images)
    some = list(images)[:3]
    assert images[:3] == some == [images[0], images[1], images[2]]
    assert images[-1] == images[len(images) - 1]
    with pytest.raises(IndexError):
        images[len(images)]
    assert all(Path(path).is_file() for path in images.stored_in())
    for kind in _subclasses(Images):
        monkeypatch.setattr(kind, "read", lambda self, row: pytest.fail("an image was read while listing"))
    everything(made.task())


def _subclasses(kind: type) -> list[type]:
    return [each for sub in kind.__subclasses__() for each in (sub, *_subclasses(sub))]


def test_no_picture_is_in_two_splits(made: Made) -> None:
    splits = [set(split.images) for split in everything(made.task()).values()]
    assert len(set().union(*splits)) == sum(map(len, splits))


def test_names_and_templates(made: Made) -> None:
    task = made.task()
    assert len(set(task.class_names)) == len(task.class_names) >= 2
    assert all(template.count("{}") == 1 for template in task.templates)
    assert set(task.synonyms) <= set(task.class_names)
    if made.kind in OWN:
        assert set(task.class_names) == {
            name.replace("/", "_") if made.kind == "image_folder_held_out" else name for name in NAMES
        }
        assert task.templates == TEMPLATES


def test_labels_are_those_of_the_names(made: Made) -> None:
    if made.kind not in OWN:
        return
    task = made.task()
    others = {split: task.split(split) for split in SPLITS}
    if made.kind != "image_folder_held_out":
        for name, split in others.items():
            counts = {task.class_names[label]: count for label, count in enumerate(np.bincount(split.labels).tolist())}
            assert counts == dict(
                zip(NAMES, {"train": (4, 2, 3), "val": (1, 2, 1), "test": (2, 1, 2)}[name], strict=True)
            )


def test_the_fingerprint_is_of_the_content(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made.task()
    assert made.task().fingerprint == task.fingerprint
    assert dataclasses.replace(task, class_names=task.class_names[::-1]).fingerprint != task.fingerprint
    if made.folder is None:
        return
    shutil.copytree(made.folder, tmp_path / "copy")
    monkeypatch.setenv("ROG_DATA", str(tmp_path / "copy"))
    copied = made.name if made.kind not in OWN else str(tmp_path / "copy")
    copy = load_task(copied)
    assert copy.fingerprint == task.fingerprint
    if made.kind != "hub_parquet":  # its pages are compressed
        _change_last_byte_of_an_image(copy.split("val"))
        assert load_task(copied).fingerprint != task.fingerprint


def _change_last_byte_of_an_image(split: Split) -> None:
    image = split.images[0]
    path = next(Path(path) for path in split.images.stored_in() if image in Path(path).read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(image) + len(image) - 1] ^= 1
    path.write_bytes(data)


def test_a_check_counts_everything(made: Made) -> None:
    task = made.task()
    found = check_task(task, sample=60)
    assert found.is_whole
    assert found.in_two == {}
    shown = [*everything(task).values(), *map(task.shift, task.shifts)]
    assert [split.images for split in found.splits] == [len(split) for split in shown]
    assert all(split.looked_at == min(split.images, 60) for split in found.splits)
    told = json.loads(json.dumps(found.record()))
    assert sum(told["splits"]["test"]["classes"].values()) == found.splits[2].images
    assert "\n".join(found.lines()).startswith(f"{task.name}: {len(task.class_names)} classes")


def test_a_file_that_went_is_named_when_its_image_is_asked_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if made.folder is None or made.kind == "whole_imagenet":
        return
    shutil.copytree(made.folder, tmp_path / "copy")
    monkeypatch.setenv("ROG_DATA", str(tmp_path / "copy"))
    split = load_task(made.name if made.kind not in OWN else str(tmp_path / "copy")).split("train")
    path = Path(split.images.stored_in()[0])
    if path.suffix.lower() not in (".jpg", ".png", ".tar"):
        return
    path.write_bytes(b"") if path.suffix == ".tar" else path.unlink()
    with pytest.raises(IntegrityError, match=r"cannot be read|shorter than when it was listed"):
        list(split.images)
