"""The hash of a large split is kept while its files lie still, and made anew when one was touched."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrieve_or_generate.tasks import digests, load_task
from retrieve_or_generate.tasks.split import ImageFiles
from tests.tasks import miniatures


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_KEPT_FROM_BYTES", 1)
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    return miniatures.image_folder(tmp_path / "birds", monkeypatch)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    read = ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda self, row: counted.append(row) or read(self, row))
    return counted


def test_images_that_lie_still_are_read_once(birds: str, reads: list[int]) -> None:
    first = load_task(birds).fingerprint
    assert len(reads) == 18
    assert load_task(birds).fingerprint == first
    assert len(reads) == 18


def test_one_that_was_touched_is_read_again(birds: str, reads: list[int]) -> None:
    first = load_task(birds).fingerprint
    path = Path(load_task(birds).split("val").images.stored_in()[0])  # type: ignore[attr-defined]
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # the times of files tick
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert load_task(birds).fingerprint != first, "whoever sets the time of writing back changes another time"
    assert len(reads) == 18 + 4


@pytest.mark.parametrize("what", ["st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_all_that_the_system_says_of_a_file_counts(birds: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some disks one of the times stands still, or goes back with a copy."""
    split, stat = load_task(birds).split("val"), Path.stat
    names = ("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    before = digests._place(split)

    def other(path: Path) -> SimpleNamespace:
        told = {name: getattr(stat(path), name) for name in names}
        return SimpleNamespace(**told | {what: told[what] - 1})

    monkeypatch.setattr(Path, "stat", other)
    assert before is not None
    assert digests._place(split) not in (None, before)


def test_what_is_kept_must_be_a_hash(birds: str, reads: list[int], tmp_path: Path) -> None:
    first = load_task(birds).fingerprint
    for path in (tmp_path / "cache/task-digests").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert load_task(birds).fingerprint == first
    assert len(reads) == 36


def test_a_small_or_a_fresh_split_is_read_each_time(
    birds: str, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 10**12)
    assert load_task(birds).fingerprint == load_task(birds).fingerprint
    assert len(reads) == 36
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    monkeypatch.setattr(digests, "_KEPT_FROM_BYTES", 10**9)
    assert load_task(birds).fingerprint
    assert len(reads) == 54
