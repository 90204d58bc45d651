"""Where units of work run: in this process, or in local worker processes of one thread each.

A unit knows nothing of where it runs. Workers load what they share (a model, decoded images) once, take units one at a time, the
most expensive first, and never outlive this process: not when it ends, is interrupted or terminated, and not when it is killed.
A unit that takes long may `tell` how far it is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from retrieve_or_generate.errors import IncompleteError, UsageError

P = TypeVar("P")
R = TypeVar("R")
Work = Callable[[P], R]
Progress = Callable[[str, int, int], None]

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_PLAIN = (UsageError, IncompleteError, OSError, MemoryError)  # what says enough without its traceback
_PATIENCE_SECONDS = 2.0  # for workers that have nothing left to do
_SAVING_SECONDS = (
    25.0  # for workers that are told to end and save first; engines that kill allow half a minute (Slurm's KillWait)
)
_TELL_SECONDS = 0.1
# On Linux workers are forked from a server that has imported what all of them need (half a gigabyte that they share, and seconds
# that each saves) and has started no thread; elsewhere the numerical libraries do not bear a fork.
_CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_PRELOADED = ["torch", "torchvision", "open_clip"]


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Unit(Generic[P]):
    """One piece of work. `payload` must pickle; `cost` is in any unit, only the order matters."""

    name: str
    payload: P
    cost: float = 1.0


_listener: ContextVar[Progress | None] = ContextVar("listener", default=None)


@contextmanager
def listening(progress: Progress | None) -> Iterator[None]:
    """What is told meanwhile reaches `progress`."""
    before = _listener.set(progress)
    try:
        yield
    finally:
        _listener.reset(before)


def tell(what: str, done: int, total: int) -> None:
    """For a unit to say how far it is: it reaches the `progress` that `run_units` was given, wherever the unit runs."""
    if listener := _listener.get():
        listener(what, done, total)


def run_units(
    units: Sequence[Unit[P]],
    prepare: Callable[[], Work[P, R]] | Sequence[Callable[[], Work[P, R]]],
    jobs: int = 1,
    *,
    apart: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[Unit[P], R]]:
    """Each unit with its result, as they finish.

    `prepare` loads what units share and returns the function that does one. With more than one job it is called once in every
    worker, so it must pickle (a module-level function, or a partial of one). A worker sees one thread; with one job, all runs in
    this process and with its threads, and so does a single unit unless it is to run `apart`, which frees its memory at the end.
    Workers that differ (each has a device of its own) are given as several `prepare`, of which worker i takes the i-th, and so on
    round. `progress` hears what units `tell`. Closing the iterator ends the workers.

    Raises:
        IncompleteError: a worker died; its unit is named. `UsageError`s, `IncompleteError`s, and what the system refuses
        (`OSError`, `MemoryError`) come through as they are, anything else as a RuntimeError that carries the worker's traceback.
    """
    if jobs < 1:
        raise UsageError(f"jobs must be 1 or more, not {jobs}")
    waiting = deque(sorted(units, key=lambda unit: -unit.cost))
    prepares = [prepare] if callable(prepare) else list(prepare)
    if jobs == 1 or len(waiting) < (1 if apart else 2):
        return _run_here(waiting, prepares[0], progress)
    return _run_in_workers(waiting, list(islice(cycle(prepares), min(jobs, len(waiting)))), progress)


def _run_here(
    waiting: deque[Unit[P]], prepare: Callable[[], Work[P, R]], progress: Progress | None
) -> Iterator[tuple[Unit[P], R]]:
    if waiting:
        work = prepare()
        for unit in waiting:
            with listening(progress):
                result = work(unit.payload)
            yield unit, result


@dataclass
class _Worker(Generic[P]):
    process: BaseProcess
    pipe: Connection
    unit: Unit[P] | None = None

    def give(self, waiting: deque[Unit[P]]) -> None:
        """Send the next unit, or the word to end; a worker that is already dead shows at the next `wait`."""
        self.unit = waiting.popleft() if waiting else None
        with suppress(BrokenPipeError):
            self.pipe.send(self.unit.payload if self.unit else _END)


class _End:
    """No more units."""


_END = _End()


@dataclass(frozen=True)
class _Told:
    """How far a unit is."""

    what: str
    done: int
    total: int


def _run_in_workers(
    waiting: deque[Unit[P]], prepares: Sequence[Callable[[], Work[P, R]]], progress: Progress | None
) -> Iterator[tuple[Unit[P], R]]:
    workers: dict[Connection, _Worker[P]] = {}
    try:
        for prepare in prepares:
            worker = _start(prepare)
            workers[worker.pipe] = worker
            worker.give(waiting)
        busy = dict(workers)
        while busy:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                message = _receive(worker)
                if isinstance(message, _Told):
                    if progress:
                        progress(message.what, message.done, message.total)
                    continue
                unit, result = message
                worker.give(waiting)
                if worker.unit is None:
                    del busy[worker.pipe]
                yield unit, result
        for worker in workers.values():  # told to end: ended by themselves they leave nothing behind
            worker.process.join(_PATIENCE_SECONDS)
    finally:
        _stop([worker.process for worker in workers.values()])
        for worker in workers.values():
            worker.pipe.close()


def _start(prepare: Callable[[], Work[P, R]]) -> _Worker[P]:
    ours, theirs = _CONTEXT.Pipe()
    environment = {**os.environ, **_ONE_THREAD}
    process = _CONTEXT.Process(target=_serve, args=(prepare, theirs, environment, Path.cwd()), daemon=True)
    with _environment(_ONE_THREAD):  # read when the numerical libraries are imported
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _receive(worker: _Worker[P]) -> tuple[Unit[P], Any] | _Told:
    assert worker.unit is not None
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        raise IncompleteError(
            f"{worker.unit.name}: its worker process {how}; what is finished is kept, run it again"
        ) from None
    if isinstance(message, _Told):
        return message
    error, result = message
    if isinstance(error, _PLAIN):
        raise error
    if error is not None:
        raise RuntimeError(f"{worker.unit.name} failed in its worker\n{error}")
    return worker.unit, result


def _stop(processes: Sequence[BaseProcess]) -> None:
    """End them: most end at once, some save where they are; when told to end again, or after `_SAVING_SECONDS`, they are killed."""
    for process in processes:
        process.terminate()
    try:
        if saving := _outlive(processes, _PATIENCE_SECONDS):
            print(
                f"rog: {saving} workers save where they are; interrupt again to end at once",
                file=sys.stderr,
                flush=True,
            )
            _outlive(processes, _SAVING_SECONDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _outlive(processes: Sequence[BaseProcess], seconds: float) -> int:
    """How many of them are still there after so many seconds; as soon as none is, 0."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return sum(process.is_alive() for process in processes)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(prepare: Callable[[], Work[P, R]], pipe: Connection, environment: dict[str, str], folder: Path) -> None:
    """The life of a worker: prepare, then unit after unit. An interrupt is for the parent, which ends its workers."""
    os.environ.clear()
    os.environ.update(environment)  # the server's are those of its own start, and so is its folder
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Downloads run in processes of its own, forbidden by multiprocessing to a child that ends with its parent. Ours watch for that.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    threading.Thread(target=end_with_parent, daemon=True).start()
    work: Work[P, R] | None = None
    _listener.set(_Teller(pipe))
    with suppress(EOFError, BrokenPipeError):
        while not isinstance(payload := pipe.recv(), _End):
            try:
                work = work or prepare()
                answer: tuple[Any, Any] = (None, work(payload))
            except OSError as error:
                answer = (_plainly(error) if error.errno is not None else traceback.format_exc(), None)
            except _PLAIN as error:
                answer = (error, None)
            except Exception:
                answer = (traceback.format_exc(), None)
            pipe.send(answer)


def _plainly(error: OSError) -> OSError:
    """The same without what libraries add to it, which may not pickle."""
    return OSError(error.errno, error.strerror, error.filename)


class _Teller:
    """Sends what a unit tells to the parent, ten times a second at most."""

    def __init__(self, pipe: Connection):
        self._pipe, self._sent = pipe, float("-inf")

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._sent >= _TELL_SECONDS:
            self._sent = now
            self._pipe.send(_Told(what, done, total))


def end_with_parent() -> None:
    """End this process as soon as its parent has ended: a killed parent cannot end its workers, so each watches in a thread."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
