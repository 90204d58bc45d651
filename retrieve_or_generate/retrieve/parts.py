"""The parts of a download: which are finished, which rows are fetched again, and the processes that do it.

A part is `00000.parquet` (`worker.PART`), sealed by `00000.json`. It is written whole under a temporary name; one that is revised
loses its seal just before it is replaced, so what is sealed is always what was sealed.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.retrieve.guard import DownloadPolicy
from retrieve_or_generate.retrieve.worker import PART, Job, is_transient, part_writer, rows_of, serve
from retrieve_or_generate.settings import DownloadSettings
from retrieve_or_generate.store import TEMPORARY_PREFIX, content_key, durable_file, read_seal, seal

_VERSION = 2  # part of every key: raise when the same bytes give other rows
_START_SECONDS = 120.0  # for a worker to import img2dataset on a busy machine
_DECODE_SECONDS = 60.0  # for one image, on the same
_TOLD = ["url", "status", "reason", "sha256", "md5"]
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Part:
    """Rows with the columns `worker.ASKED`, and where what came of them is kept."""

    asked: pa.Table
    path: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.asked.to_pylist()
        return rows

    @property
    def seal_path(self) -> Path:
        return self.path.with_suffix(".json")

    def read(self, columns: list[str]) -> pa.Table:
        return pq.read_table(self.path, columns=columns)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the part that is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=self.path.parent) as folder:
            yield Path(folder)


class Count:
    """Tells how many rows are done, from whichever thread."""

    def __init__(self, progress: Callable[[int], None] | None):
        self.progress, self.done, self.lock = progress, 0, threading.Lock()

    def add(self, rows: int) -> None:
        with self.lock:
            self.done += rows
            if self.progress:
                self.progress(self.done)


class Parts:
    """What is done with the parts of one download, in `processes` lanes with a worker each."""

    def __init__(self, policy: DownloadPolicy, settings: DownloadSettings, blocklist: Blocklist, processes: int):
        self.policy, self.settings, self.blocklist, self.processes = policy, settings, blocklist, processes

    def ensure(self, parts: list[Part], passed: Count) -> list[bool]:
        """Fetch the parts that are not sealed; which were. None of them holds bytes that are blocked afterwards."""
        return self._each(parts, lambda worker, part: self._ensure(worker, part, passed))

    def retry(self, parts: list[Part]) -> None:
        """Fetch what failed in the parts and may end otherwise another time."""
        self._each(parts, lambda worker, part: self._revise(worker, part, is_transient))

    def _each(self, parts: list[Part], work: Callable[[_Worker, Part], bool]) -> list[bool]:
        """What `work` says of every part. When one fails, or we are interrupted, all workers end at once."""
        waiting, told = deque(enumerate(parts)), [False] * len(parts)
        workers = [_Worker(self.policy, self.settings, self.blocklist) for _ in range(self.processes)]

        def lane(worker: _Worker) -> None:
            with worker:
                while waiting:
                    try:
                        index, part = waiting.popleft()
                    except IndexError:  # another thread was faster
                        return
                    told[index] = work(worker, part)

        with ThreadPoolExecutor(self.processes) as pool:
            lanes = [pool.submit(lane, worker) for worker in workers]
            try:
                for done in futures.wait(lanes, return_when=futures.FIRST_EXCEPTION).done:
                    done.result()
            except BaseException:
                waiting.clear()
                for worker in workers:
                    worker.stop()
                raise
        return told

    def _key(self, part: Part) -> str:
        """What a part follows from, besides the web."""
        limits = [self.settings.least_pixels, self.settings.most_pixels, self.policy.max_bytes]
        asked = [list(row.values()) for row in part.rows]
        return content_key([_VERSION, asked, limits, self.policy.robot_names, self.policy.opt_out_directives])

    def _ensure(self, worker: _Worker, part: Part, passed: Count) -> bool:
        there = read_seal(part.path.parent, part.seal_path.name, self._key(part)) is not None
        if there:
            self._revise(worker, part, lambda status, reason: False)
        else:
            part.seal_path.unlink(missing_ok=True)
            with part.scratch() as folder, durable_file(part.path) as temporary:
                worker.fetch(part, part.rows, folder, temporary)
            self._seal(part)
        passed.add(len(part.rows))
        return there

    def _revise(self, worker: _Worker, part: Part, again: Callable[[str, str], bool]) -> bool:
        """Write a part anew where the blocklist has changed, or where `again` says of a status and reason to fetch once more."""
        told, rows = part.read(_TOLD).to_pylist(), part.rows
        blocked = [self._is_blocked(asked, row) for asked, row in zip(rows, told, strict=True)]
        gone = {place for place, row in enumerate(told) if row["status"] == "ok" and blocked[place]}
        fresh = {
            place
            for place, row in enumerate(told)
            if again(row["status"], row["reason"]) or (_was_listed(row) and not blocked[place])
        }
        if not gone and not fresh:
            return False
        with part.scratch() as folder, durable_file(part.path) as temporary:
            worker.fetch(part, [rows[place] for place in sorted(fresh)], folder, folder / "fresh.parquet")
            _merge(part.path, gone, fresh, folder / "fresh.parquet", temporary)
            part.seal_path.unlink()
        self._seal(part)
        return True

    def _is_blocked(self, asked: dict[str, Any], row: dict[str, Any]) -> bool:
        found = self.blocklist.blocks(sha256=row["sha256"], md5=row["md5"])
        known = {name: asked[name] for name in ("url", "sha256", "md5", "id")}
        return found or self.blocklist.blocks(**known)

    def _seal(self, part: Part) -> None:
        seal(part.path.parent, part.seal_path.name, self._key(part), [part.path])


def _was_listed(row: dict[str, Any]) -> bool:
    """Whether it was kept out by an entry that can be looked up again, and not by one that it was led to."""
    return row["status"] == "blocked" and not row["reason"].startswith("hop:")


def _merge(old: Path, gone: Collection[int], fresh: Collection[int], found: Path, target: Path) -> None:
    """The rows of `old`: those of `fresh` replaced by the rows of `found`, in order, and the images of `gone` left out."""
    newer = (row for table in rows_of(found, PART.names) for row in table.to_pylist())
    place = 0
    with part_writer(target) as writer:
        for table in rows_of(old, PART.names):
            rows = []
            for row in table.to_pylist():
                rows.append(next(newer) if place in fresh else _without_image(row) if place in gone else row)
                place += 1
            writer.write_table(pa.Table.from_pylist(rows, PART))


def _without_image(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"status": "blocked", "reason": "listed: on the blocklist, by its URL, hash or id", "image": None}


class _Worker:
    """A process that img2dataset runs in, started when there is something to fetch. It may die or hang without us."""

    def __init__(self, policy: DownloadPolicy, settings: DownloadSettings, blocklist: Blocklist):
        self.policy, self.settings, self.blocklist = policy, settings, blocklist
        self.process: BaseProcess | None = None
        self.stopped = False

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def stop(self) -> None:
        """End what it does, from another thread; its `fetch` raises."""
        self.stopped, process = True, self.process
        if process is not None:
            process.kill()

    def fetch(self, part: Part, rows: list[dict[str, Any]], folder: Path, target: Path) -> None:
        """Write one row for every one of `rows` to `target`; `folder` is scratch.

        An image that ends the process is marked as such, and the rest goes on. Raises `IncompleteError` when it died or hung
        otherwise.
        """
        deadly: set[int] = set()
        while True:
            self._start()
            self.pipe.send(Job(rows, folder, target, self.settings, frozenset(deadly)))
            culprit, problem = self._watch()
            if not problem:
                return
            self._end()
            if culprit < 0 or self.stopped:
                raise IncompleteError(f"{part.path}: {problem}; what is finished is kept, run it again")
            deadly.add(culprit)

    def _watch(self) -> tuple[int, str]:
        """Follow a job to its end: the row whose image was being looked at (−1: none), and what went wrong ("": nothing)."""
        place, patience = -1, _START_SECONDS + self.policy.deadline_seconds + self.policy.most_wait_seconds
        while self.pipe.poll(patience if place < 0 else _DECODE_SECONDS):
            try:
                what, value = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                return place, "its download worker died"
            if what != "beat":
                return -1, "" if what == "done" else value
            place = value
        return place, "its download hung and was ended"

    def _start(self) -> None:
        if self.process is None:
            self.pipe, theirs = _CONTEXT.Pipe()
            self.process = _CONTEXT.Process(target=serve, args=(theirs, self.policy, self.blocklist), daemon=True)
            self.process.start()
            theirs.close()
            if self.stopped:  # meanwhile
                self.process.kill()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None
