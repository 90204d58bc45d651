"""Units of work: whatever makes them, in which order, and however often it is killed, the set is the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate import store
from retrieve_or_generate.errors import IncompleteError, UsageError
from retrieve_or_generate.image_set import CANDIDATES_SEAL, ImageSet
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.store import locked
from retrieve_or_generate.synthesize import OtherRanksError, Share, perturb, synthesize
from retrieve_or_generate.synthesize.requests import Request
from retrieve_or_generate.synthesize.units import cut, is_made
from retrieve_or_generate.tasks import Task

from .conftest import HALF
from .painter import Painter, Painters

SMALL = SynthesizeSettings(num_inference_steps=4, batch_size=4, shard_size=8)
Make = Callable[..., ImageSet]


@pytest.fixture(scope="module")
def make(task: Task, retrieved: ImageSet, clip: Clip) -> Make:
    def of(out: Path, generator: Any = None, settings: SynthesizeSettings = SMALL, **more: Any) -> ImageSet:
        return synthesize(task, retrieved, generator or Painter(), clip, out, settings, HALF, **more)

    return of


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A set that was made in one go."""
    return told(make(tmp_path_factory.mktemp("whole") / "set").folder)


def told(folder: Path) -> dict[str, bytes]:
    """Every file of a set; locks and what curation keeps for itself aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def requests(count: int) -> list[Request]:
    return [Request(f"k{i}", 0, f"prompt {i}", i) for i in range(count)]


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_request_is_in_one_shard_in_its_order(count: int, size: int, first: int) -> None:
    shards = cut(requests(count), size, first, {})
    assert [request for shard in shards for request in shard.requests] == requests(count)
    assert [shard.number for shard in shards] == list(range(first, first + len(shards)))
    assert all(1 <= len(shard.requests) <= size for shard in shards)


def test_a_shards_key_is_of_what_its_images_follow_from() -> None:
    key = cut(requests(3), 4, 0, {"version": 1})[0].key
    assert key == cut(requests(3), 9, 0, {"version": 1})[0].key
    other = [*requests(2), Request("k2", 0, "another prompt", 2)]
    assert len({key, cut(other, 4, 0, {"version": 1})[0].key, cut(requests(3), 4, 0, {"version": 2})[0].key}) == 3


def test_shards_are_files_of_the_set_and_nothing_else_is_left(make: Make, tmp_path: Path) -> None:
    made = make(tmp_path / "set")
    left = sorted(path.name for path in made.folder.iterdir())
    assert left == [".described", ".lock", *(f"{n:05d}.tar" for n in range(5)), *sorted(left)[-4:]]
    assert made.manifest.groupby("shard").size().tolist() == [8, 8, 8, 8, 2]


def test_workers_make_the_same_bytes_and_all_are_heard(make: Make, whole: dict[str, bytes], tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    made = make(tmp_path / "set", Painters(2), progress=lambda *said: heard.append(said))
    assert told(made.folder) == whole
    counted = [done for what, done, total in heard if what == "synthetic images" and total == 34]
    assert counted == sorted(counted)
    assert counted[-1] == 34


def _child(work: Callable[[], object]) -> int:
    """A process like this one, at work."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


def _ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _dies_at(call: int, number: int) -> None:
    if number == call:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("call", [0, 1, 4, 7])
def test_a_run_that_is_killed_goes_on_where_it_was(
    make: Make, whole: dict[str, bytes], tmp_path: Path, call: int
) -> None:
    out = tmp_path / "set"
    killed = _child(lambda: make(out, Painter(before=partial(_dies_at, call))))
    assert _ended(killed) == -signal.SIGKILL
    assert not (out / "image_set.json").exists()
    painter = Painter()
    assert told(make(out, painter).folder) == whole
    assert len(painter.calls) == 9 - 2 * (call // 2)  # whole shards of two batches each are there already


def test_a_run_that_is_killed_at_any_moment_goes_on_where_it_was(
    make: Make, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, kills = tmp_path / "set", 0
    for pause in np.linspace(0.0, 0.4, 9):
        process = _child(lambda: make(out, Painter(before=lambda _: time.sleep(0.01))))
        time.sleep(pause)
        os.kill(process, signal.SIGKILL)
        kills += _ended(process) == -signal.SIGKILL
    assert kills
    assert told(make(out).folder) == whole
    assert not list(out.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["00001.tar", ".unit-00001.parquet", ".unit-00001.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-600], lambda data: b"\0" + data[1:], None])
def test_a_damaged_shard_is_made_again(
    make: Make, whole: dict[str, bytes], tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    out = tmp_path / "set"
    assert _ended(_child(lambda: make(out, Painter(before=partial(_dies_at, 6))))) == -signal.SIGKILL
    (out / name).write_bytes(damage((out / name).read_bytes())) if damage else (out / name).unlink()
    painter = Painter()
    assert told(make(out, painter).folder) == whole
    assert len(painter.calls) == 9 - 4


def test_other_settings_start_anew(make: Make, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    other = SMALL.model_copy(update={"guidance_scale": 1.0, "shard_size": 2})
    assert _ended(_child(lambda: make(out, Painter(before=partial(_dies_at, 6)), other))) == -signal.SIGKILL
    painter = Painter()
    assert told(make(out, painter).folder) == whole
    assert len(painter.calls) == 9


def test_ranks_fill_one_folder_in_any_order(make: Make, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(OtherRanksError, match=r"rank 2 of 3 has made its 1 shards; 4 of other ranks are not there yet"):
        make(out, share=Share(2, 3))
    with pytest.raises(OtherRanksError, match=r"rank 0 of 3 has made its 2 shards; 2 of other ranks"):
        make(out, share=Share(0, 3))
    with pytest.raises(OtherRanksError, match="2 of other ranks"):
        make(out, Painter(before=_never), share=Share(0, 3))
    painter = Painter()
    assert told(make(out, painter, share=Share(1, 3)).folder) == whole
    assert len(painter.calls) == 3
    assert told(make(out, Painter(before=_never), share=Share(2, 3)).folder) == whole  # late, and nothing left to do


def _never(call: int) -> None:
    raise AssertionError("nothing was to be made")


def test_ranks_work_at_once(make: Make, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    ranks = [_child(partial(make, out, Painter(), share=Share(rank, 3))) for rank in range(3)]
    assert 0 in [_ended(rank) for rank in ranks]  # the last one finishes; the others end by saying so
    assert told(out) == whole


def test_a_rank_that_is_killed_is_run_again(make: Make, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    killed = _child(lambda: make(out, Painter(before=partial(_dies_at, 3)), share=Share(0, 2)))
    assert _ended(killed) == -signal.SIGKILL
    with pytest.raises(OtherRanksError):
        make(out, share=Share(1, 2))
    painter = Painter()
    assert told(make(out, painter, share=Share(0, 2)).folder) == whole
    assert len(painter.calls) == 3
    assert not list(out.glob(".tmp-*"))


def test_a_folder_in_use_is_refused(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with locked(out), pytest.raises(UsageError, match=r"in use by another run \(process \d+\)"):
        make(out)
    with locked(out), pytest.raises(UsageError, match="in use by another run"):
        make(out, share=Share(0, 2))
    begun: list[int] = []

    def meanwhile(call: int) -> None:
        if not begun:
            begun.append(call)
            for share in (None, Share(0, 2)):
                with pytest.raises(UsageError, match="in use by another run"):
                    make(out, share=share)
            with pytest.raises(UsageError, match="in use by another run"):
                make(out, settings=SMALL.model_copy(update={"eta": 0.5}), share=Share(1, 2))

    with pytest.raises(OtherRanksError):
        make(out, Painter(before=meanwhile), share=Share(0, 2))
    assert begun


def test_a_rank_is_one_of_the_world() -> None:
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match=f"rank {rank} of {world}: ranks go from 0"):
            Share(rank, world)


@pytest.mark.parametrize("name", ["00002.tar", ".unit-00002.parquet", CANDIDATES_SEAL, "candidates.parquet"])
def test_a_full_disk_leaves_nothing_half_written(
    make: Make, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out, replace = tmp_path / "set", Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == name and b"unfinished" not in self.read_bytes():
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.Path, "replace", full)
        with pytest.raises(OSError, match="No space left") as raised:
            make(out)
    assert Path(str(raised.value.filename)).name == name
    assert not list(out.glob(".tmp-*"))
    assert not (out / "image_set.json").exists()
    assert told(make(out).folder) == whole


class _MortalPainters(Painters):
    def loads(self, settings: SynthesizeSettings, shards: int) -> list[Callable[[], Any]]:
        return [_mortal] * 2


def _mortal() -> Any:
    return Painter(before=partial(_dies_at, 2))


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_shard_alone(make: Make, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(IncompleteError, match=r"0000\d.tar: its worker process was ended by signal 9"):
        make(out, _MortalPainters(2))
    assert list(out.glob(".unit-*.json"))
    painter = Painter()
    assert told(make(out, painter).folder) == whole
    assert len(painter.calls) < 9


def test_perturbed_images_are_units_too(task: Task, retrieved: ImageSet, clip: Clip, tmp_path: Path) -> None:
    def of(out: Path, painter: Any, share: Share | None = None) -> ImageSet:
        return perturb(task, retrieved, painter, clip, out, 0.5, SMALL, HALF, share=share)

    once = told(of(tmp_path / "once", Painter()).folder)
    killed = _child(lambda: of(tmp_path / "killed", Painter(before=partial(_dies_at, 5))))
    assert _ended(killed) == -signal.SIGKILL
    painter = Painter()
    assert told(of(tmp_path / "killed", painter).folder) == once
    assert len(painter.calls) == 5
    with pytest.raises(OtherRanksError):
        of(tmp_path / "ranks", Painter(), Share(1, 2))
    assert told(of(tmp_path / "ranks", Painter(), Share(0, 2)).folder) == once


@settings(deadline=None, max_examples=20)
@given(st.binary(max_size=40))
def test_what_is_no_seal_is_no_shard(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    shard, out = cut(requests(2), 2, 0, {})[0], tmp_path_factory.mktemp("unit")
    (out / shard.seal).write_bytes(data)
    assert not is_made(out, shard)
    (out / shard.seal).write_text(json.dumps({"key": shard.key, "files": {shard.name: {"bytes": 1, "sha256": ""}}}))
    assert not is_made(out, shard)
