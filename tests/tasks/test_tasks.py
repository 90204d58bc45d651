"""Task folders in CLIP_benchmark's layout, and how one can be wrong. `test_kinds.py` has what holds for every task."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pocket.places import task_place
from retrieve_or_generate.store import write_tar
from retrieve_or_generate.tasks import Task, load_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(load_task("textures").folder, tmp_path / "textures")


def opened(folder: Path) -> Task:
    return load_task(str(folder))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        UsageError,
        match=r"unknown task 'texture'; did you mean 'textures'\? \(known: aircraft, aircraft-shifted, digits,",
    ):
        load_task("texture")


def test_one_class_is_no_task(folder: Path) -> None:
    (folder / "classnames.txt").write_text("striped")
    with pytest.raises(UsageError, match="1 class; a task needs two or more"):
        opened(folder)


def test_a_class_named_twice(folder: Path) -> None:
    (folder / "classnames.txt").write_text("striped\ndotted\nstriped")
    with pytest.raises(UsageError, match="'striped' stands there twice"):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n", "no template; put one a line"), ("a {c}.\na photo\n", r"'a photo' has no \{c\}, where")],
)
def test_templates_without_a_class_name(folder: Path, text: str, message: str) -> None:
    (folder / "zeroshot_classification_templates.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        opened(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="birds: no such folder; give --task a task folder, or one of digits"):
        load_task(str(tmp_path / "birds"))


def test_a_label_out_of_range_is_named(folder: Path) -> None:
    (folder / "classnames.txt").write_text("striped\ndotted")
    with pytest.raises(IntegrityError, match=r"0.tar: \d{6}.cls: label '\d' is not a class id below 2"):
        opened(folder).split("val")
    names = [f"texture {place}" for place in range(7)]
    (folder / "classnames.txt").write_text("\n".join(names))
    with pytest.raises(IntegrityError, match="label '7' is not a class id below 7"):  # the first that is too large
        opened(folder).split("val")


def test_a_missing_shard_and_a_truncated_one(folder: Path) -> None:
    path = folder / "val/0.tar"
    path.write_bytes(path.read_bytes()[: 512 * 5 + 100])
    with pytest.raises(IntegrityError, match=r"val/0.tar: not a whole tar|images but"):
        opened(folder).split("val")
    path.unlink()
    with pytest.raises(IntegrityError, match=r"val/0.tar: missing; .*nshards.txt announces 1"):
        opened(folder).split("val")


def test_members_in_folders_and_a_compressed_tar(folder: Path) -> None:
    keys = opened(folder).split("val").keys
    with tarfile.open(folder / "val/0.tar") as tar:
        tar.extractall(folder / "out", filter="data")
    with tarfile.open(folder / "val/0.tar", "w") as tar:
        tar.add(folder / "out", "./some.where")
    assert sorted(opened(folder).split("val").keys) == [f"some.where/{key}" for key in sorted(keys)]
    with tarfile.open(folder / "val/0.tar", "w:gz") as tar:
        tar.add(folder / "out", ".")
    with pytest.raises(IntegrityError, match=r"val/0\.tar: not a whole tar"):
        opened(folder).split("val")


def test_an_image_without_label(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(folder / "val/0.tar") as tar:
        tar.extract("000000.jpg", tmp_path, filter="data")
    with tarfile.open(folder / "val/0.tar", "w") as tar:
        tar.add(tmp_path / "000000.jpg", "000000.jpg")
    with pytest.raises(IntegrityError, match="1 images but 0 labels"):
        opened(folder).split("val")


def test_a_changed_byte_of_a_named_task_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = load_task("textures").folder
    monkeypatch.setenv("ROG_CACHE", str(tmp_path))
    path = shutil.copytree(folder, task_place("textures")) / "val/0.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"val/0.tar: its bytes changed"):
        load_task("textures")


def test_wordnet_ids_where_there_is_a_file(folder: Path) -> None:
    assert opened(folder).wnids == ()
    wnids = tuple(f"n{i:08d}" for i in range(len(opened(folder).class_names)))
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    assert opened(folder).wnids == wnids


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["n00000001"], r"wnids\.txt: 1 ids for 8 classes; give each class a line"),
        (["n00000001"] * 7 + ["02012849"], r"wnids\.txt: '02012849' is no WordNet id, such as n02012849"),
    ],
)
def test_wordnet_ids_that_do_not_fit(lines: list[str], told: str, folder: Path) -> None:
    (folder / "wnids.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=told):
        opened(folder)


@pytest.mark.parametrize("label", ["²", "-1", "1e3", "9" * 40, "9" * 10**6])
def test_a_label_that_is_no_class_id(label: str, tmp_path: Path) -> None:
    """Without names for the numbers, too, whatever they would ask to be listed."""
    for split in ("train", "val", "test"):
        members = [("a.cls", label.encode()), ("a.jpg", b""), ("b.cls", b"0"), ("b.jpg", b"")]
        write_tar(tmp_path / split / "0.tar", members)
    for classes in ("classes: [jay, rook]", "classes: {'0': jay, '1': rook}"):
        (tmp_path / "task.yaml").write_text(f"templates: ['{{}}']\n{classes}")
        with pytest.raises(IntegrityError, match=r"train/0.tar: a.cls: label '.{1,20}' is not a class id"):
            opened(tmp_path).split("train")


@pytest.mark.parametrize(
    ("text", "told"), [("²", "not a number of shards"), ("9" * 6, "1.tar: missing; .* announces 999999")]
)
def test_shards_that_are_announced_and_not_there(text: str, told: str, folder: Path) -> None:
    (folder / "val/nshards.txt").write_text(text)
    with pytest.raises(IntegrityError, match=told):
        opened(folder).split("val")
