"""`rog tasks`: what it says of a task, of one with faults, and of one whose files are not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from retrieve_or_generate import cli
from retrieve_or_generate.tasks import load_task
from retrieve_or_generate.tasks.check import check_task
from retrieve_or_generate.tasks.published import PUBLISHED
from tests.tasks import miniatures


def rog(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    miniatures.image_folder(tmp_path / "birds", monkeypatch)
    return tmp_path / "birds"


def test_a_whole_task(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rog("tasks", str(birds), "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"birds: 3 classes, 2 templates, {birds}"
    assert re.fullmatch(r"train +9 +2 to 4 +[\d.]+ kB +10 10 10 +0", lines[2])
    assert [line.split()[0] for line in lines[1:-1]] == ["split", "train", "val", "test"]
    told = json.loads(lines[-1])
    assert told["splits"]["val"]["classes"] == {"grey heron": 1, "mute swan": 2, "owl/eagle-owl": 1}
    assert told["splits"]["val"]["sides"] == [10, 10, 10]


def test_faults_are_named_and_end_with_code_2(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (birds / "test/mute swan/a.jpg").write_bytes(b"<html>")
    (birds / "test/mute swan/b.jpg").write_bytes(b"")
    first = next((birds / "train/mute swan").iterdir())
    (birds / "val/mute swan/copy.jpg").write_bytes(first.read_bytes())
    assert rog("tasks", str(birds)) == 2
    out = capsys.readouterr().out
    assert "test: 2 images cannot be read (mute swan/a.jpg: format: neither JPEG nor PNG nor WebP" in out
    assert "mute swan/b.jpg: empty: no bytes); replace them or leave them out" in out
    assert "train, val: 1 images are in both" in out


def test_an_image_that_stands_twice_in_a_split_is_said(birds: Path) -> None:
    assert not any("bytes of another" in line for line in check_task(load_task(str(birds))).lines())
    first = next((birds / "test/mute swan").iterdir())
    (birds / "test/grey heron/copy.jpg").write_bytes(first.read_bytes())
    assert "test: 1 images have the bytes of another one in it" in check_task(load_task(str(birds))).lines()


def test_a_sample_says_that_it_is_one(birds: Path) -> None:
    found = check_task(load_task(str(birds)), sample=2)
    assert [split.looked_at for split in found.splits] == [2, 2, 2]
    assert "train: 2 of 9 images read" in found.lines()


def test_a_sample_is_spread_over_the_whole_split(birds: Path) -> None:
    """The last class would else be left out, since images lie by class."""
    keys = load_task(str(birds)).split("train").keys
    (birds / "train" / keys[7]).write_bytes(b"")
    found = check_task(load_task(str(birds)), sample=5).splits[0]
    assert (found.looked_at, list(found.unreadable)) == (5, [keys[7]])
    assert check_task(load_task(str(birds)), sample=50).splits[0].looked_at == 9


def test_a_class_that_a_split_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(miniatures.parquet_of_paths(tmp_path / "birds", monkeypatch))
    found = check_task(task)
    assert not [line for line in found.lines() if "no image" in line]
    monkeypatch.setitem(miniatures.COUNTS, "val", (1, 0, 1))
    found = check_task(load_task(miniatures.parquet_of_paths(tmp_path / "fewer", monkeypatch)))
    assert "val: no image of 1 classes (mute swan)" in found.lines()
    assert found.is_whole


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_has_to_be_fetched_is_said_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROG_DATA", "")
    assert rog("tasks", name) == 2
    said = capsys.readouterr().err
    assert (
        f"task {name} is read from files of yours; name the folder with your data sets by --data FOLDER or ROG_DATA"
        in said
    )
    assert rog("tasks", name, "--data", str(tmp_path)) == 2
    said = capsys.readouterr().err
    published = PUBLISHED[name]
    assert said.startswith(f"rog: task {name}: {tmp_path}/{published.folder}/{published.needs[0]}: not there. ")
    assert len(said.splitlines()) == 1
    assert all(needed.split("/")[0] in said for needed in published.needs)
    assert f"{tmp_path}/{published.folder}/" in said.partition("not there. ")[2]


def test_published_tasks_are_listed_as_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    miniatures.dtd(tmp_path, monkeypatch)
    assert rog("tasks", "--data", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert re.search(rf"dtd +47 +1880 +1880 +1880  {tmp_path}/dtd/dtd\n", out)
    assert re.search(rf"stanford-cars .* not in {tmp_path}; rog tasks stanford-cars says what to fetch\n", out)


def test_a_shift_says_which_classes_it_shows_and_what_it_shares_with_a_split(birds: Path) -> None:
    for place, name in enumerate(("mute swan", "grey heron")):
        folder = birds.parent / "drawn" / name
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(miniatures.PNG + bytes([place]))
    copied = next((birds / "test/grey heron").iterdir())
    (birds.parent / "drawn/grey heron/2.jpg").write_bytes(copied.read_bytes())
    with (birds / "task.yaml").open("a") as file:
        file.write("\nshifts: {drawn: ../drawn}\n")
    lines = check_task(load_task(str(birds))).lines()
    assert any(re.match(r"drawn +3 +1 to 2 ", line) for line in lines)
    assert "drawn: a shift that shows 2 of 3 classes; it is measured among those" in lines
    assert "test, drawn: 1 images are in both" in lines
