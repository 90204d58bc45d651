from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from retrieve_or_generate import executors
from retrieve_or_generate.errors import IncompleteError, UsageError
from retrieve_or_generate.executors import Unit, run_units, tell


def square(number: int) -> int:
    return number * number


def squares() -> Callable[[int], int]:
    return square


def threads_and_process(_: int) -> tuple[str | None, int]:
    return os.environ.get("OMP_NUM_THREADS"), os.getpid()


def server_and_variable(_: int) -> tuple[int, str | None]:
    return os.getppid(), os.environ.get("ROG_TEST")


def servers() -> Callable[[int], tuple[int, str | None]]:
    return server_and_variable


def environments() -> Callable[[int], tuple[str | None, int]]:
    return threads_and_process


class HubError(OSError):
    """As libraries make them: it does not come out of a pickle."""

    def __init__(self, message: str, code: int):
        super().__init__(code, message, "a.tar")


def fail(how: str) -> str:
    if how == "usage":
        raise UsageError("no such class")
    if how == "bug":
        raise ZeroDivisionError("one by zero")
    if how == "full":
        raise HubError("no space", errno.ENOSPC)
    if how == "memory":
        raise MemoryError
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return how


def _saying(word: str) -> Callable[[int], tuple[str, Path]]:
    return lambda _: (time.sleep(0.05), (word, Path.cwd()))[1]


def failures() -> Callable[[str], str]:
    return fail


def tell_twice(total: int) -> int:
    tell("halves", 1, total)
    tell("halves", total, total)
    return os.getpid()


def tellers() -> Callable[[int], int]:
    return tell_twice


def nested(number: int) -> int:
    return sum(result for _, result in run_units([Unit(str(i), i) for i in range(number)], squares, 2))


def nests() -> Callable[[int], int]:
    return nested


def _note(folder: Path, number: int) -> None:
    (folder / f"{number}-{os.getpid()}").touch()
    time.sleep(60)


def sleepers(folder: Path) -> Callable[[int], None]:
    return partial(_note, folder)


def _save_when_told(folder: Path, seconds: float) -> None:
    def save(*_: object) -> None:
        time.sleep(seconds)
        (folder / f"saved-{os.getpid()}").touch()
        os._exit(143)

    signal.signal(signal.SIGTERM, save)
    tell("waiting", 1, 1)
    time.sleep(60)


def savers(folder: Path) -> Callable[[float], None]:
    return partial(_save_when_told, folder)


def units(*payloads: object) -> list[Unit[object]]:
    return [Unit(f"unit-{payload}", payload) for payload in payloads]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_unit_once(jobs: int) -> None:
    done = {unit.name: result for unit, result in run_units(units(1, 2, 3, 4, 5), squares, jobs)}
    assert done == {f"unit-{n}": n * n for n in (1, 2, 3, 4, 5)}


def test_no_units_prepare_nothing() -> None:
    assert list(run_units([], pytest.fail, jobs=1)) == []


def test_the_most_expensive_goes_first() -> None:
    work = [Unit("small", 1, cost=1), Unit("large", 3, cost=9), Unit("middle", 2, cost=4)]
    assert [unit.name for unit, _ in run_units(work, squares, jobs=1)] == ["large", "middle", "small"]


def test_workers_are_other_processes_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    results = [result for _, result in run_units(units(1, 2), environments, jobs=2)]
    assert {threads for threads, _ in results} == {"1"}
    assert os.getpid() not in {process for _, process in results}
    assert "OMP_NUM_THREADS" not in os.environ


def test_workers_see_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("ROG_TEST", value)
        assert {seen for _, (_, seen) in run_units(units(1, 2), servers, jobs=2)} == {value}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_forked_from_a_process_without_threads() -> None:
    (server,) = {server for _, (server, _) in run_units(units(1, 2), servers, jobs=2)}
    assert server != os.getpid()
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_users_mistake_comes_through(jobs: int) -> None:
    with pytest.raises(UsageError, match="no such class"):
        list(run_units(units("usage", "usage"), failures, jobs))


def test_a_bug_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)unit-bug failed.*ZeroDivisionError: one by zero"):
        list(run_units(units("bug", "bug"), failures, jobs=2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_the_system_refuses_comes_through(jobs: int) -> None:
    with pytest.raises(OSError, match="no space") as raised:
        list(run_units(units("full", "full"), failures, jobs))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "a.tar")
    with pytest.raises(MemoryError):
        list(run_units(units("memory", "memory"), failures, jobs))


def test_workers_that_differ_and_the_folder_they_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both = [partial(_saying, "first"), partial(_saying, "second")]
    results = [result for _, result in run_units(units(*range(6)), both, jobs=2)]
    assert {folder for _, folder in results} == {tmp_path}
    assert {word for word, _ in results} == {"first", "second"}


def test_a_dead_worker_is_named() -> None:
    with pytest.raises(IncompleteError, match="unit-killed: its worker process was ended by signal 9"):
        list(run_units(units("killed", "killed"), failures, jobs=2))


@pytest.mark.parametrize("apart", [False, True])
def test_a_single_unit_runs_apart_only_if_asked_and_tells_how_far_it_is(apart: bool) -> None:
    told: list[tuple[str, int, int]] = []
    units = [Unit("two", 2)]
    [(_, process)] = run_units(units, tellers, 2, apart=apart, progress=lambda *said: told.append(said))
    assert told == [("halves", 1, 2), ("halves", 2, 2)]
    assert (process != os.getpid()) == apart
    assert [process for _, process in run_units(units, tellers, 2, apart=apart)] != []


@pytest.mark.parametrize(("takes", "allowed", "saved"), [(0.5, 20.0, 2), (30.0, 0.3, 0)])
def test_a_worker_that_saves_is_waited_for_but_not_for_ever(
    takes: float,
    allowed: float,
    saved: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(executors, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(executors, "_SAVING_SECONDS", allowed)
    ready: list[str] = []

    def both(what: str, done: int, total: int) -> None:
        ready.append(what)
        if len(ready) == 2:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_units([Unit("a", takes), Unit("b", takes)], partial(savers, tmp_path), 2, progress=both))
    assert time.monotonic() - started < 25
    assert len(list(tmp_path.glob("saved-*"))) == saved
    assert capsys.readouterr().err == "rog: 2 workers save where they are; interrupt again to end at once\n"


def test_told_twice_a_worker_that_saves_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(processes: list[object], seconds: float) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(executors, "_outlive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in run_units([Unit("a", 30.0)], partial(savers, tmp_path), 2, apart=True, progress=_interrupt):
            pass
    assert not multiprocessing.active_children()


def _interrupt(what: str, done: int, total: int) -> None:
    raise SystemExit(143)


def test_a_unit_may_have_processes_of_its_own() -> None:
    assert [result for _, result in run_units([Unit("three", 3)], nests, 2, apart=True)] == [0 + 1 + 4]


def test_nobody_needs_to_listen() -> None:
    tell("nothing", 0, 1)


def test_no_jobs_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="jobs must be 1 or more, not 0"):
        run_units(units(1), squares, jobs=0)


_PARENT = """
import sys
from functools import partial
from pathlib import Path
from retrieve_or_generate.executors import Unit, run_units
from test_executors import sleepers
if __name__ == "__main__":
    list(run_units([Unit(str(n), n) for n in range(2)], partial(sleepers, Path(sys.argv[1])), jobs=2))
"""


def _alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def _until(true: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (reached := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return reached


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    script, notes = tmp_path / "parent.py", tmp_path / "notes"
    script.write_text(_PARENT)
    notes.mkdir()
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(notes)], env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL
    )
    assert _until(lambda: len(list(notes.iterdir())) == 2)
    workers = [int(note.name.partition("-")[2]) for note in notes.iterdir()]
    parent.send_signal(how)
    parent.wait(10)
    assert _until(lambda: not any(_alive(worker) for worker in workers), seconds=5)
