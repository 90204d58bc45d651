"""`task.yaml`: what it can say, shifted test sets, and the ways in which one can be wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import random_split

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.store import write_tar
from retrieve_or_generate.tasks import Task, load_task
from retrieve_or_generate.tasks.tables import Tables
from tests.tasks import miniatures
from tests.tasks.miniatures import NAMES, PNG, task_yaml, write

Opened = Callable[[str], Task]


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of images; herons, swans and owls in train, val and test."""
    miniatures.image_folder(tmp_path / "birds", monkeypatch)
    return tmp_path / "birds"


@pytest.fixture
def told(birds: Path) -> Opened:
    """The task of the folder when its file says so."""

    def opened(text: str) -> Task:
        return load_task(task_yaml(birds, text))

    return opened


def test_names_are_those_of_folders_unless_told(told: Opened) -> None:
    assert told("").class_names == ("grey heron", "mute swan", "owl_eagle-owl")
    renamed = told("classes: {mute swan: swan, owl_eagle-owl: owl, grey heron: heron}")
    assert renamed.class_names == ("swan", "owl", "heron")
    assert np.bincount(renamed.split("train").labels).tolist() == [2, 3, 4]
    together = told("classes: {mute swan: white, owl_eagle-owl: brown, grey heron: white}")
    assert together.class_names == ("white", "brown")
    assert np.bincount(together.split("train").labels).tolist() == [6, 3]


def test_labels_follow_the_list_not_the_order_of_folders(told: Opened, birds: Path) -> None:
    task = told(f"classes: {list(NAMES[::-1])}")
    assert np.bincount(task.split("train").labels).tolist() == [3, 2, 4]
    write(birds / "classnames.txt", "\n".join([NAMES[1], NAMES[2], NAMES[0]]))
    assert np.bincount(told("").split("train").labels).tolist() == [2, 3, 4]
    assert np.bincount(told("").split("val").labels).tolist() == [2, 1, 1]


def test_what_is_held_out_is_what_torch_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(miniatures.image_folder_held_out(tmp_path / "birds", monkeypatch))
    task = load_task(str(folder))
    everything = sorted(path.relative_to(folder / "birds").as_posix() for path in folder.glob("birds/*/*.jpg"))
    parts = random_split(everything, [0.5, 0.2, 0.3], generator=torch.Generator().manual_seed(42))  # type: ignore[arg-type]
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        assert list(task.split(name).keys) == [everything[row] for row in sorted(part.indices)]
    counted = load_task(task_yaml(folder, "data: birds\ntrain: .\nval: 7\ntest: 11"))
    assert [len(counted.split(name)) for name in ("train", "val", "test")] == [39, 7, 11]


def test_splits_can_be_called_otherwise(told: Opened) -> None:
    task = told("val: test\ntest: val")
    assert [len(task.split(name)) for name in ("train", "val", "test")] == [9, 5, 4]


def test_a_clip_benchmark_folder_without_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(miniatures.clip_benchmark(tmp_path / "birds", monkeypatch))
    (folder / "val").rename(tmp_path / "gone")
    with pytest.raises(
        UsageError, match=r"no split 'val' \(there are: test, train\); put a task.yaml there .* val: 0.2"
    ):
        load_task(str(folder))
    write(folder / "task.yaml", "val: 0.25")
    task = load_task(str(folder))
    assert (task.class_names, task.templates) == (NAMES, miniatures.TEMPLATES)
    assert [len(task.split(name)) for name in ("train", "val", "test")] == [7, 2, 5]


def test_keys_that_begin_anew_in_each_shard_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = load_task(miniatures.clip_benchmark(tmp_path, monkeypatch)).split("train").keys
    assert [keys[0], keys[5]] == ["0/s0000000", "1/s0000000"]


def test_a_task_extends_another(told: Opened, birds: Path, tmp_path: Path) -> None:
    base = told(f"classes: {list(NAMES)}")
    write(tmp_path / "more/task.yaml", "extends: ../birds\ntemplates: ['{}']\nshifts: {mirrored: {data: ../birds/val}}")
    write(tmp_path / "more/queries.tsv", "mute swan\tswan\tbird\n")
    more = load_task(str(tmp_path / "more"))
    assert (more.name, more.class_names, more.templates) == ("more", base.class_names, ("{}",))
    assert more.caption_queries[1].alternatives() == [("swan", "bird")]
    assert more.split("test").images[0] == base.split("test").images[0]
    assert list(more.shifts) == ["mirrored"]
    assert len(more.shift("mirrored")) == 4
    write(tmp_path / "digits/task.yaml", "extends: digits\nname: numbers")
    assert load_task(str(tmp_path / "digits")).templates == load_task("digits").templates
    write(tmp_path / "more/task.yaml", "extends: ../birds\nval: 0.2")
    with pytest.raises(UsageError, match="val is of the task that it extends"):
        load_task(str(tmp_path / "more"))


@pytest.mark.parametrize("length", [1, 200])  # no system has room for a path of a thousand long names
def test_tasks_that_extend_each_other(length: int, tmp_path: Path) -> None:
    one, other = "a" * length, "b" * length
    write(tmp_path / f"{one}/task.yaml", f"extends: ../{other}")
    write(tmp_path / f"{other}/task.yaml", f"extends: ../{one}")
    with pytest.raises(UsageError, match="extends goes round in a circle"):
        load_task(str(tmp_path / one))


def test_an_image_that_is_none_is_named_where_it_is_decoded(told: Opened, birds: Path) -> None:
    write(birds / "test/mute swan/a.jpg", b"<html>")
    split = told("").split("test")
    with pytest.raises(
        IntegrityError, match=r"birds/test: mute swan/a.jpg: cannot be decoded \(format: .*rog tasks lists all"
    ):
        split.decoded(8)


class TestShifts:
    def test_classes_are_matched_by_name_and_some_may_lack(self, told: Opened, tmp_path: Path) -> None:
        for name in ("owl_eagle-owl", "grey heron"):
            write(tmp_path / f"drawn/{name}/1.png", PNG)
        task = told(f"classes: {list(NAMES)}\nshifts: {{drawn: ../drawn}}")
        shift = task.shift("drawn")
        assert sorted(zip(shift.keys, shift.labels.tolist(), strict=True)) == [
            ("grey heron/1.png", 0),
            ("owl_eagle-owl/1.png", 2),
        ]
        assert told(f"classes: {list(NAMES)}").fingerprint == task.fingerprint
        with pytest.raises(UsageError, match=r"unknown shift of task birds 'drwan'; did you mean 'drawn'\?"):
            task.shift("drwan")

    def test_a_class_of_no_name_is_an_error_unless_it_is_left_out(self, told: Opened, tmp_path: Path) -> None:
        for name in ("heron", "hoopoe", "mute swan"):
            write(tmp_path / f"drawn/test/{name}/1.png", PNG)
        with pytest.raises(
            UsageError,
            match=r"shift drawn: unknown class 'heron'; did you mean 'grey heron'\?.*classes: \{LABEL: CLASS\}",
        ):
            told("shifts: {drawn: ../drawn}")
        named = "{heron: grey heron, mute swan: mute swan}"
        shift = told(f"shifts: {{drawn: {{data: ../drawn, classes: {named}}}}}").shift("drawn")
        assert (list(shift.keys), shift.labels.tolist()) == (["heron/1.png", "mute swan/1.png"], [0, 1])
        with pytest.raises(
            UsageError, match="yaml: shift drawn: unknown class 'gray heron'; did you mean 'grey heron'"
        ):
            told("shifts: {drawn: {data: ../drawn, classes: {heron: gray heron}}}")
        with pytest.raises(UsageError, match="shift drawn: unknown label 'herron'; did you mean 'heron'"):
            told("shifts: {drawn: {data: ../drawn, classes: {herron: grey heron, hoopoe: mute swan}}}")

    def test_by_wordnet_id_and_by_number(self, told: Opened, birds: Path, tmp_path: Path) -> None:
        write(birds / "wnids.txt", "n02009912\nn01860187\nn01621127\n")
        for folder in ("sketch/n01860187", "sketch/n01621127", "numbered/2", "numbered/0"):
            write(tmp_path / folder / "1.png", PNG)
        task = told("shifts: {sketch: ../sketch, numbered: ../numbered}")
        assert sorted(task.shift("sketch").labels.tolist()) == [1, 2]
        assert task.shift("numbered").labels.tolist() == [0, 2]

    def test_one_class_alone_measures_nothing(self, told: Opened, tmp_path: Path) -> None:
        write(tmp_path / "drawn/mute swan/1.png", PNG)
        with pytest.raises(UsageError, match=r"shift drawn of task birds: all images are of 'mute swan'; give it two"):
            told("shifts: {drawn: ../drawn}").shift("drawn")

    def test_content_has_a_fingerprint_of_its_own(self, told: Opened, tmp_path: Path) -> None:
        for name in ("mute swan", "grey heron"):
            write(tmp_path / f"drawn/{name}/1.png", PNG)
        before = told("shifts: {drawn: ../drawn}").shift_fingerprints
        assert before == told("shifts: {drawn: {data: ../drawn}}").shift_fingerprints
        write(tmp_path / "drawn/mute swan/1.png", PNG + b"x")
        after = told("shifts: {drawn: ../drawn}").shift_fingerprints
        assert (list(before), before == after) == (["drawn"], False)

    def test_a_number_beyond_a_list_of_names_is_no_class_of_the_task(self, told: Opened, tmp_path: Path) -> None:
        for number in "012":
            write(tmp_path / f"drawn/{number}/1.png", PNG)
        called = "[owl_eagle-owl, grey heron, mute swan]"
        assert told(f"shifts: {{drawn: {{data: ../drawn, classes: {called}}}}}").shift("drawn").labels.tolist() == [
            2,
            0,
            1,
        ]
        with pytest.raises(UsageError, match="shift drawn: unknown class '2'"):
            told("shifts: {drawn: {data: ../drawn, classes: [owl_eagle-owl, grey heron]}}")

    def test_from_another_layout(self, told: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        miniatures.clip_benchmark(tmp_path / "other", monkeypatch)
        write(tmp_path / "other/classnames.txt", "\n".join([NAMES[2], NAMES[0], NAMES[1]]))
        task = told(f"classes: {list(NAMES)}\nshifts: {{other: ../other}}")
        assert np.bincount(task.shift("other").labels).tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("valid: 0.2", r"task.yaml: unknown key 'valid'; did you mean 'val'\?"),
        (
            "kind: folder",
            "task.yaml: kind: input should be 'image_folder', 'image_tar', 'webdataset', 'hugging_face' or 'parquet', not 'folder'",
        ),
        ("data: nowhere", r"data: .*nowhere: no such file or folder"),
        (
            "val: dev",
            r"no split 'dev' in .*birds \(there are: test, train, val\); hold some of train out with val: 0.2",
        ),
        ("val: 9", "9 of 9 images cannot be held out; hold out fewer"),
        ("val: 0.01", "9 images are too few for 2 parts, 1 of them empty"),
        ("val: 0.2\ntest: 3", "hold out shares, such as 0.2, or numbers of images, not one of each"),
        ("classes: [grey heron]", "classes: 1 class; a task needs two or more"),
        ("classes: [owl, owl]", "classes: 'owl' stands there twice"),
        ("classes: [grey heron, mute swan]", r"birds/train: owl_eagle-owl/\d\.JPG: unknown class 'owl_eagle-owl'"),
        (
            "classes: [grey heron, mute swan, owl_eagle-owl, hoopoe]",
            r"train: no image \(JPEG, PNG or WebP\) of class 'hoopoe'; a folder of it belongs",
        ),
        ("classes: names.txt", "names.txt: missing"),
        ("image: picture", "image, label and split name columns of tables, but the kind is image_folder"),
        ("kind: parquet", "neither what save_to_disk of Hugging Face writes nor parquet files"),
        ("kind: webdataset", r"no split 'train' in"),
        ("name: a/b", "name: string should match pattern"),
        ("shifts: {drawn: nowhere}", "nowhere: no such file or folder"),
        (
            "shifts: {test: {data: ., test: test}}",
            r"task.yaml: shifts: 'test' is a split; call the shift something else",
        ),
        ("shifts: [drawn]", r"task.yaml: shifts: input should be a mapping of keys to values, not .*drawn"),
        ("val: true", "task.yaml: val: input should be a share such as 0.2, a number of images, or .*, not 'True'"),
        ("shifts: {../drawn: .}", r"task.yaml: shifts\.\.\./drawn: .*not '../drawn'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str, told: Opened) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        told(text).split("train")
    assert "\n" not in str(raised.value)


def test_a_class_folder_that_is_missing_or_empty(birds: Path) -> None:
    for left in (birds / "test/mute swan").iterdir():
        left.unlink()
    with pytest.raises(
        UsageError, match=r"birds/test: no image \(.*\) of class 'mute swan'; a folder of it belongs there"
    ):
        load_task(str(birds)).split("test")
    (birds / "test/mute swan").rmdir()
    with pytest.raises(UsageError, match=r"birds/test: no image .* of class 'mute swan'"):
        load_task(str(birds)).split("test")


def test_templates_are_needed(birds: Path) -> None:
    write(birds / "task.yaml", "")
    with pytest.raises(UsageError, match=r"task\.yaml: a task file is a mapping"):
        load_task(str(birds))
    write(birds / "task.yaml", 'templates: "a {}"')
    with pytest.raises(UsageError, match=r'task.yaml: templates: a list, or a file; a single one is \["a {}"\]'):
        load_task(str(birds))
    write(birds / "task.yaml", "name: birds")
    with pytest.raises(UsageError, match="no templates; say what stands around class names"):
        load_task(str(birds / "task.yaml"))
    write(birds / "task.yaml", "templates: imagenet")
    assert len(load_task(str(birds)).templates) == 80
    write(birds / "task.yaml", "templates: around.txt")
    write(birds / "around.txt", "a {c}.\n")
    assert load_task(str(birds)).templates == ("a {}.",)
    write(birds / "task.yaml", "templates: [a photo]")
    with pytest.raises(UsageError, match=r"task\.yaml: templates: 'a photo' has no"):
        load_task(str(birds))


def test_a_folder_that_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no classnames.txt and no task.yaml, so no task; docs/tasks.md says what one is"
    ):
        load_task(str(tmp_path))
    with pytest.raises(UsageError, match=r"birds.yaml: no such folder; give --task a task folder"):
        load_task("birds.yaml")


class TestTables:
    def table(self, folder: Path, **columns: list[object]) -> str:
        for place in range(4):
            write(folder / f"{place}.png", PNG)
        pq.write_table(pa.table(columns), folder / "train.parquet")
        return task_yaml(folder, "val: 0.25\ntest: 0.25")

    paths = [f"{place}.png" for place in range(4)]  # noqa: RUF012

    def test_parts_of_a_split_come_in_the_order_of_their_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a disk lists first is another one's last, and what is held out follows from the order."""
        for place in range(4):
            write(tmp_path / f"{place}.png", PNG)
            columns = {"path": [f"{place}.png"], "label": [["a", "b"][place % 2]]}
            pq.write_table(pa.table(columns), tmp_path / f"train-0000{place}-of-00004.parquet")
        parts = sorted(tmp_path.glob("*.parquet"))
        for listed in (parts, parts[::-1]):
            monkeypatch.setattr(Path, "rglob", lambda *_, listed=listed: iter(listed))
            assert list(Tables(tmp_path).listing("train").keys) == self.paths

    def test_numbers_need_names(self, tmp_path: Path) -> None:
        self.table(tmp_path, path=self.paths, label=[0, 1, 2, 0])
        with pytest.raises(
            UsageError, match=r"labels are numbers; say what they are called, in the order of the numbers"
        ):
            load_task(str(tmp_path))
        task_yaml(tmp_path, "val: 0.25\ntest: 0.25\nclasses: [a, b, c]")
        task = load_task(str(tmp_path))
        labels = {
            key: label for name in ("train", "val", "test") for key, label in zip(*_keyed(task, name), strict=True)
        }
        assert labels == dict(zip(self.paths, [0, 1, 2, 0], strict=True))

    @pytest.mark.parametrize(
        ("labels", "told", "message"),
        [
            ([0, 1, 2, 3], "classes: [a, b, c]", r"3\.png: label 3 is not a class id below 3"),
            ([0, 1, -1, 1], "classes: [a, b]", r"label: -1 in row 2 is not a class id below 2"),
            ([0, 1, None, 1], "classes: [a, b]", r"1 rows have no label"),
            (["a", "b", "q", "a"], "classes: [a, b]", r"2\.png: unknown class 'q'"),
        ],
    )
    def test_labels_out_of_range(self, labels: list[object], told: str, message: str, tmp_path: Path) -> None:
        self.table(tmp_path, path=self.paths, label=labels)
        with pytest.raises(IntegrityError, match=message):
            load_task(task_yaml(tmp_path, f"val: 0.25\ntest: 0.25\n{told}")).split("train")

    def test_columns_are_found_or_asked_for(self, tmp_path: Path) -> None:
        self.table(tmp_path, path=self.paths, file=self.paths, label=["a", "b", "a", "b"], kind=["x", "y", "y", "x"])
        with pytest.raises(
            UsageError, match=r"several columns of images \(path, file\); say which one in task.yaml as image: COLUMN"
        ):
            load_task(str(tmp_path))
        task = load_task(task_yaml(tmp_path, "val: 0.25\ntest: 0.25\nimage: file\nlabel: kind"))
        assert task.class_names == ("x", "y")
        with pytest.raises(UsageError, match=r"unknown column 'fille'; did you mean 'file'\?"):
            load_task(task_yaml(tmp_path, "val: 0.25\ntest: 0.25\nimage: fille"))
        self.table(tmp_path, number=[1.0, 2.0], label=["a", "b"])
        with pytest.raises(UsageError, match=r"no column of images; .*\(there are: number, label\)"):
            load_task(task_yaml(tmp_path, "val: 0.5\ntest: 0.25")).split("train")

    def test_an_image_that_is_listed_twice(self, tmp_path: Path) -> None:
        self.table(tmp_path, path=["0.png", "1.png", "0.png"], label=["a", "b", "b"])
        with pytest.raises(IntegrityError, match=r"train: 0\.png stands there twice; leave one of them out"):
            load_task(str(tmp_path)).split("train")

    def test_names_that_are_numbers_are_names_when_they_are_told(self, tmp_path: Path) -> None:
        self.table(tmp_path, path=self.paths, label=[1, 0, 1, 0])
        write(tmp_path / "classnames.txt", "0\n1\n")
        assert load_task(str(tmp_path)).class_names == ("0", "1")

    def test_a_file_that_is_no_table(self, tmp_path: Path) -> None:
        self.table(tmp_path, path=self.paths, label=["a", "b", "a", "b"])
        write(tmp_path / "train.parquet", b"PAR1")
        with pytest.raises(IntegrityError, match=r"train.parquet: not a readable table"):
            load_task(str(tmp_path))

    def test_an_image_that_is_not_there(self, tmp_path: Path) -> None:
        self.table(tmp_path, path=self.paths, label=["a", "b", "a", "b"])
        (tmp_path / "2.png").unlink()
        task = load_task(str(tmp_path))
        with pytest.raises(IntegrityError, match=r"2\.png: cannot be read \(No such file or directory\)"):
            [list(task.split(name).images) for name in ("train", "val", "test")]


def _keyed(task: Task, name: str) -> tuple[list[str], list[int]]:
    split = task.split(name)  # type: ignore[arg-type]
    return list(split.keys), split.labels.tolist()


def test_an_empty_line_among_class_names_would_move_those_after_it(told: Opened, birds: Path) -> None:
    write(birds / "classnames.txt", f"{NAMES[1]}\n{NAMES[2]}\n{NAMES[0]}\n\n")
    assert np.bincount(told("").split("train").labels).tolist() == [2, 3, 4]
    write(birds / "classnames.txt", f"{NAMES[1]}\n \n{NAMES[2]}\n{NAMES[0]}\n")
    with pytest.raises(UsageError, match=r"classnames.txt: line 2 is empty, and class ids are numbers of lines"):
        told("")


def test_a_file_name_that_is_no_text_is_named(told: Opened, birds: Path) -> None:
    (birds / "test/mute swan" / os.fsdecode(b"\xff.png")).write_bytes(PNG)
    with pytest.raises(IntegrityError, match=r"birds/test: 'mute swan/\\udcff.png' is no file name in UTF-8; rename"):
        told("").split("test")


def test_numbers_in_a_table_that_no_list_of_classes_goes_up_to(tmp_path: Path) -> None:
    table = pa.table({"image": [PNG] * 3, "label": pa.array([0, 1, 10**12])})
    for split in ("train", "val", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(IntegrityError, match=r"train: label: 1000000000000 in row 2 is not a class id below 1000000"):
        load_task(task_yaml(tmp_path, "classes: [jay, rook]"))
    told = {"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, None]}, "image": {"_type": "Image"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)}), tmp_path / "train.parquet")
    with pytest.raises(IntegrityError, match=r"train.parquet: what the labels of label are called is no list of words"):
        load_task(task_yaml(tmp_path, "classes: [jay, rook]"))


class TestTars:
    def test_unpacked_it_is_the_same_task(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        makers = (miniatures.image_folder, miniatures.image_tar, miniatures.tar_of_each_split)
        tasks = [load_task(made(tmp_path / made.__name__, monkeypatch)) for made in makers]
        assert len({task.fingerprint for task in tasks}) == 1

    def test_a_shift_as_it_is_published(self, told: Opened, tmp_path: Path) -> None:
        write_tar(tmp_path / "drawn.tar", [("drawn/README.txt", b""), ("drawn/mute swan/b.png", PNG)])
        with pytest.raises(UsageError, match="all images are of 'mute swan'"):
            told("shifts: {drawn: ../drawn.tar}").shift("drawn")
        write_tar(tmp_path / "drawn.tar", [("a/mute swan/b.png", PNG), ("/b/grey heron/a.png", PNG)])
        with pytest.raises(
            UsageError, match=r"shift drawn: no split 'test' in .* \(there are: a, b\); say which: test:"
        ):
            told("shifts: {drawn: ../drawn.tar}")
        write_tar(tmp_path / "drawn.tar", [("drawn/mute swan/b.png", PNG), ("drawn/grey heron/a.png", PNG + b"x")])
        shift = told("shifts: {drawn: ../drawn.tar}").shift("drawn")
        assert (shift.keys, shift.labels.tolist()) == (["grey heron/a.png", "mute swan/b.png"], [0, 1])
        assert shift.images[0] == PNG + b"x"

    def test_what_is_no_tar_of_class_folders(self, told: Opened, tmp_path: Path) -> None:
        (tmp_path / "drawn.tar").write_bytes(gzip.compress(b"x" * 2000))
        with pytest.raises(IntegrityError, match=r"drawn.tar: not a whole tar, or a compressed one: unpack that"):
            told("shifts: {drawn: ../drawn.tar}")
        write_tar(tmp_path / "drawn.tar", [("a.png", PNG)])
        with pytest.raises(UsageError, match=r"drawn.tar: a.png lies in no folder; an image of a class lies in CLASS/"):
            told("shifts: {drawn: ../drawn.tar}")
        write_tar(tmp_path / "drawn.tar", [])
        with pytest.raises(UsageError, match=r"shift drawn: no split 'test' in .*drawn.tar \(there are: none\)"):
            told("shifts: {drawn: ../drawn.tar}")


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (pa.array(["a\0.png", "b.png"]), ["jay", "rook"], r"train: 'a\\x00.png' is no file name"),
        (pa.array([], pa.binary()), pa.array([], pa.string()), "labels of train: 0 class; a task needs two or more"),
    ],
)
def test_tables_that_hold_no_images(images: pa.Array, labels: Any, told: str, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"{split}.parquet")
    with pytest.raises(UsageError, match=told):
        load_task(task_yaml(tmp_path)).split("train")
