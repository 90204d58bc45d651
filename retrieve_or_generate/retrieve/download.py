"""Bulk download: img2dataset under guard, in processes of our own.

Takes a table of keys and URLs; writes `00000.parquet`, … with one row for every URL (key, url, status, reason, sha256 and the raw
bytes, never re-encoded), each sealed by `00000.json`. A sealed part is not fetched again. img2dataset's `Downloader` does the
work, through the opener of `guard`; its resume, exit codes and re-encoding are not used, and what it loses track of is counted.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.retrieve.guard import DownloadPolicy, GuardedOpener
from retrieve_or_generate.store import (
    TEMPORARY_PREFIX,
    content_key,
    durable_file,
    locked,
    read_seal,
    remove_leftovers,
    seal,
)

__all__ = ["DOWNLOADS", "DownloadPolicy", "download", "downloaded"]

_PART = pa.schema(
    [*((name, pa.string()) for name in ("key", "url", "status", "reason", "sha256")), ("image", pa.binary())]
)
DOWNLOADS = pa.schema([*list(_PART)[:-1], ("part", pa.string())])
_ASKED = ["key", "url", "md5"]
_QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "WANDB_SILENT": "true"}
_INPUT, _URLS = pa.schema([("own_key", pa.string()), ("url", pa.string())]), "urls.arrow"
_START_SECONDS = 120.0  # for a worker to import img2dataset on a busy machine
_CONTEXT = multiprocessing.get_context("spawn")


def download(
    urls: pa.Table,
    out: Path,
    policy: DownloadPolicy | None = None,
    *,
    processes: int = 1,
    part_rows: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """Fetch `urls` (columns `key`, each once, `url`, and `md5` where known) into parts under `out`; what came of each, in order.

    `status` is ok, failed (it could not be had, or its md5 is another) or refused (by the policy or by the site), `reason` a code
    and a detail.
    `progress` is told how many URLs are done. Raises `IncompleteError` when a worker died or hung; what is finished is kept.
    """
    policy = policy or DownloadPolicy()
    if "md5" not in urls.column_names:
        urls = urls.append_column("md5", pa.nulls(urls.num_rows, pa.string()))
    asked = urls.select(_ASKED)
    parts = [asked.slice(start, part_rows) for start in range(0, asked.num_rows, part_rows)]
    with locked(out), ThreadPoolExecutor(processes) as pool:
        remove_leftovers(out)
        waiting = deque(enumerate(parts))
        passed = _Count(progress)
        for lane in [pool.submit(_fetch_parts, waiting, out, policy, passed) for _ in range(processes)]:
            lane.result()
    tables = [pq.read_table(out / _name(i), columns=_PART.names[:-1]) for i in range(len(parts))]
    told = [table.append_column("part", pa.repeat(_name(i), table.num_rows)) for i, table in enumerate(tables)]
    return pa.concat_tables([DOWNLOADS.empty_table(), *told])


def downloaded(out: Path, table: pa.Table) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every image of `table` (what `download` into `out` returned) that was fetched, in its order."""
    for name in dict.fromkeys(table["part"].to_pylist()):
        part = pq.read_table(out / name, columns=["key", "image"], filters=[("status", "=", "ok")])
        yield from zip(part["key"].to_pylist(), part["image"].to_pylist(), strict=True)


def _name(index: int) -> str:
    return f"{index:05d}.parquet"


class _Count:
    """Tells how many rows are done, from whichever thread."""

    def __init__(self, progress: Callable[[int], None] | None):
        self.progress, self.done, self.lock = progress, 0, threading.Lock()

    def add(self, rows: int) -> None:
        with self.lock:
            self.done += rows
            if self.progress:
                self.progress(self.done)


def _fetch_parts(waiting: deque[tuple[int, pa.Table]], out: Path, policy: DownloadPolicy, passed: _Count) -> None:
    """Take parts until none is left; those that are sealed already are passed over."""
    told = {name: value for name, value in asdict(policy).items() if name not in ("threads", "allowed_endpoints")}
    with _Worker(policy) as worker:
        while waiting:
            try:
                index, urls = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            key = content_key([urls.to_pydict(), told, sorted(policy.allowed_endpoints)])
            _ensure_part(worker, urls, out / _name(index), key)
            passed.add(urls.num_rows)


def _ensure_part(worker: _Worker, urls: pa.Table, path: Path, key: str) -> None:
    seal_path = path.with_suffix(".json")
    if read_seal(path.parent, seal_path.name, key) is not None:
        return
    seal_path.unlink(missing_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent) as folder,
        durable_file(path) as temporary,
    ):
        pq.write_table(worker.fetch(urls, Path(folder), path), temporary, compression="zstd")
    seal(path.parent, seal_path.name, key, [path])


class _Worker:
    """A process that img2dataset runs in, started when there is something to fetch. It may die or hang without us."""

    def __init__(self, policy: DownloadPolicy):
        self.policy = policy
        self.process: BaseProcess | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()

    def fetch(self, urls: pa.Table, folder: Path, path: Path) -> pa.Table:
        """One row for every URL; `folder` is scratch, `path` what the result will be called."""
        if self.process is None:
            self.pipe, theirs = _CONTEXT.Pipe()
            self.process = _CONTEXT.Process(target=_serve, args=(theirs, self.policy), daemon=True)
            self.process.start()
            theirs.close()
        with pa.ipc.new_file(str(folder / _URLS), _INPUT) as writer:
            writer.write_table(urls.select(_ASKED[:2]).rename_columns(_INPUT.names).cast(_INPUT))
        self.pipe.send((folder, urls.num_rows))
        if not self.pipe.poll(
            _START_SECONDS + (1 + urls.num_rows / self.policy.threads) * self.policy.deadline_seconds
        ):
            raise IncompleteError(f"{path}: its download hung and was ended; what is finished is kept, run it again")
        try:
            self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise IncompleteError(f"{path}: its download worker died; what is finished is kept, run it again") from None
        return _reconciled(urls, pq.read_table(folder / "00000.parquet"))


def _serve(pipe: Connection, policy: DownloadPolicy) -> None:
    """The life of a worker. The opener is set for the whole process, so it has to be one of its own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(_QUIET)
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset would load it, and does as well without
    urllib.request.install_opener(GuardedOpener(policy))
    with suppress(EOFError):
        while True:
            folder, rows = pipe.recv()
            _run_img2dataset(folder, rows, policy)
            pipe.send(rows)


def _run_img2dataset(folder: Path, rows: int, policy: DownloadPolicy) -> None:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter

    downloader = Downloader(
        sample_writer_class=ParquetSampleWriter,
        resizer=Resizer(256, "no", False, disable_all_reencoding=True),
        thread_count=policy.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=_INPUT.names,
        timeout=policy.deadline_seconds,
        number_sample_per_shard=max(rows, 2),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    downloader.download_shard((0, str(folder / _URLS)))


def _end_with_parent() -> None:
    """A killed parent cannot end its worker, so the worker watches for that."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _reconciled(urls: pa.Table, written: pa.Table) -> pa.Table:
    """One row for every URL asked for, in their order; img2dataset leaves out a sample that it failed to write."""
    found = {row["own_key"]: row for row in written.to_pylist()}
    rows = [_row(asked, found.get(asked["key"])) for asked in urls.to_pylist()]
    return pa.Table.from_pylist(rows, _PART)


def _row(asked: dict[str, str], row: dict[str, Any] | None) -> dict[str, Any]:
    out = {"key": asked["key"], "url": asked["url"], "sha256": "", "image": None, "status": "failed"}
    if row is None:
        return out | {"reason": "lost: img2dataset wrote no row for it"}
    if row["status"] != "success":
        status, _, reason = (row["error_message"] or "").partition(" ")
        told = status in ("failed", "refused")
        return out | ({"status": status, "reason": reason} if told else {"reason": f"other: {row['error_message']}"})
    md5 = hashlib.md5(row["jpg"], usedforsecurity=False).hexdigest()
    if asked["md5"] and asked["md5"] != md5:
        return out | {"reason": f"changed: md5 is {md5}, not {asked['md5']}"}
    return out | {"status": "ok", "reason": "", "sha256": row["sha256"], "image": row["jpg"]}
