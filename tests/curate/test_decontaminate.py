"""Copies of the task's own images are found, all of them, and the descriptors of its images are kept but never trusted blindly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from retrieve_or_generate.curate import kinds as kinds_module
from retrieve_or_generate.curate import thumbnail
from retrieve_or_generate.curate.decontaminate import EvaluationImages, contaminated, evaluation_images
from retrieve_or_generate.curate.kinds import Kind, View
from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.pocket.world import planted
from retrieve_or_generate.pool.layout import open_pool
from retrieve_or_generate.tasks import Task, load_task
from retrieve_or_generate.tasks.base import Split

THUMBNAILS = Kind(thumbnail.NAME, thumbnail.NAME, View("square", 32), thumbnail.describe)
BOTH = ("val", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Descriptors are kept beside, the pocket world stays where it is."""
    from retrieve_or_generate.curate import decontaminate

    monkeypatch.setattr(decontaminate, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def _found(sha256: np.ndarray, described: np.ndarray, evaluation: EvaluationImages) -> dict[int, str]:
    return contaminated(sha256, evaluation, thumbnail.comparison(described, evaluation.descriptors))


@pytest.mark.parametrize("name", ["digits", "textures", "aircraft"])
def test_every_planted_evaluation_copy_of_the_pool_is_found_and_nothing_else(name: str) -> None:
    truth, task, pool = planted().to_pandas(), load_task(name), open_pool("pocket")
    mine = truth[(truth["task"] == name) | (truth["kind"] == "distractor").mul(truth["row"] % 4 == 0)]
    images = pool.image_bytes(mine["row"].tolist())
    mine = mine[mine["row"].isin(images.keys())].reset_index(drop=True)
    described = thumbnail.describe(decode_all([images[row] for row in mine["row"]], 32))
    found = _found(np.full(len(mine), ""), described, evaluation_images(task, BOTH, THUMBNAILS))
    copies = mine[mine["kind"] == "evaluation_copy"]
    assert len(copies) == 48
    assert {row: f"{name}/{key}" for row, key in found.items()} == copies["of"].to_dict()


def test_training_images_are_looked_for_when_asked() -> None:
    task = load_task("textures")
    train = task.split("train")
    described = thumbnail.describe(decode_all(train.images[:3], 32))
    nothing = np.full(3, "")
    assert _found(nothing, described, evaluation_images(task, BOTH, THUMBNAILS)) == {}
    wanted = evaluation_images(task, ("train", "test"), THUMBNAILS)
    assert _found(nothing, described, wanted) == {row: f"train/{train.keys[row]}" for row in range(3)}


class _Lying:
    def __init__(self, split: Split):
        self.split = split

    def read(self) -> Split:
        return self.split


def test_shifted_test_sets_are_test_images() -> None:
    task = load_task("textures")
    task = dataclasses.replace(task, shifts={"drawn": _Lying(task.split("train").take(np.arange(20)))})
    described = thumbnail.describe(decode_all(task.shift("drawn").images[:2], 32))
    found = _found(np.full(2, ""), described, evaluation_images(task, BOTH, THUMBNAILS))
    assert found == {row: f"drawn/{task.shift('drawn').keys[row]}" for row in range(2)}
    assert _found(np.full(2, ""), described, evaluation_images(task, ("val",), THUMBNAILS)) == {}


def test_equal_bytes_are_copies_whatever_they_look_like() -> None:
    evaluation = EvaluationImages(
        ("val/a", "val/b", "test/c"), np.array(["x", "y", "y"]), np.zeros((3, 352), np.float32)
    )
    described = np.full((2, 352), 200, np.float32)
    assert _found(np.array(["y", "z"]), described, evaluation) == {0: "val/b"}


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "zeroed":
        path.write_bytes(data[:128] + bytes(len(data) - 128))
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "zeroed", "empty", "missing"])
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_damaged_cache_is_made_anew_never_used(own_cache: Path, how: str, suffix: str) -> None:
    task = load_task("textures")
    whole = evaluation_images(task, BOTH, THUMBNAILS)
    for path in (own_cache / "descriptors").glob(f"*.{suffix}"):
        _damage(path, how)
    again = evaluation_images(task, BOTH, THUMBNAILS)
    assert np.array_equal(again.descriptors, whole.descriptors)
    reads = _counting(THUMBNAILS)
    assert np.array_equal(evaluation_images(task, BOTH, reads.kind).descriptors, whole.descriptors)
    assert reads.images == 0


def test_a_cache_whose_rows_moved_is_made_anew(own_cache: Path) -> None:
    task = load_task("textures")
    whole = evaluation_images(task, BOTH, THUMBNAILS).descriptors
    for path in (own_cache / "descriptors").glob("*.npy"):
        np.save(path, np.load(path)[::-1])
    assert np.array_equal(evaluation_images(task, BOTH, THUMBNAILS).descriptors, whole)


@dataclasses.dataclass
class _Counted:
    kind: Kind
    images: int = 0


def _counting(kind: Kind) -> _Counted:
    counted = _Counted(kind)

    def compute(pixels: np.ndarray) -> np.ndarray:
        counted.images += len(pixels)
        return kind.compute(pixels)

    counted.kind = dataclasses.replace(kind, compute=compute)
    return counted


class _Fake(Task):
    """A task whose splits are given."""

    def split(self, name: str) -> Split:  # type: ignore[override]
        return self.splits[name]  # type: ignore[attr-defined,no-any-return]


def _fake(images: list[bytes]) -> Task:
    task = _Fake("fake", ("a", "b"), ("{}",), Path("fake"))
    keys = tuple(f"{i:03d}" for i in range(len(images)))
    object.__setattr__(task, "splits", {"val": Split(keys, tuple(images), np.zeros(len(images), np.int64))})
    return task


def test_only_what_changed_is_described_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_module, "CHUNK", 4)
    images = list(load_task("textures").split("val").images[:10])
    for given, described in ((images, 10), (images, 0), (images[:6] + images[7:], 4 - 1 + 2), (images[::-1], 10)):
        counted = _counting(THUMBNAILS)
        evaluation = evaluation_images(_fake(given), ("val",), counted.kind)
        assert counted.images == described
        assert np.array_equal(evaluation.descriptors, thumbnail.describe(decode_all(given, 32)))
    other = _counting(dataclasses.replace(THUMBNAILS, fingerprint="other weights"))
    evaluation_images(_fake(images), ("val",), other.kind)
    assert other.images == 10


def test_a_description_that_was_cut_short_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_module, "CHUNK", 4)
    images = list(load_task("textures").split("val").images[:10])

    def failing(pixels: np.ndarray) -> np.ndarray:
        if len(pixels) == 2:
            raise KeyboardInterrupt
        return thumbnail.describe(pixels)

    with pytest.raises(KeyboardInterrupt):
        evaluation_images(_fake(images), ("val",), dataclasses.replace(THUMBNAILS, compute=failing))
    counted = _counting(THUMBNAILS)
    evaluation_images(_fake(images), ("val",), counted.kind)
    assert counted.images == 2


def test_an_evaluation_image_that_is_none_is_named() -> None:
    with pytest.raises(IntegrityError, match=r"fake: val/001: cannot be decoded \(format: "):
        evaluation_images(_fake([load_task("textures").split("val").images[0], b"<html>"]), ("val",), THUMBNAILS)


def test_a_cache_of_another_key_is_not_this_one(own_cache: Path) -> None:
    images = list(load_task("textures").split("val").images[:4])
    evaluation_images(_fake(images[:2]), ("val",), THUMBNAILS)
    (first,) = (path.stem for path in (own_cache / "descriptors").glob("*.npy"))
    evaluation_images(_fake(images[2:]), ("val",), THUMBNAILS)
    folder = own_cache / "descriptors"
    (second,) = (path.stem for path in folder.glob("*.npy") if path.stem != first)
    for suffix in ("npy", "json"):  # a whole pair under the other's name
        (folder / f"{first}.{suffix}").write_bytes((folder / f"{second}.{suffix}").read_bytes())
    counted = _counting(THUMBNAILS)
    evaluation_images(_fake(images[:2]), ("val",), counted.kind)
    assert counted.images == 2
