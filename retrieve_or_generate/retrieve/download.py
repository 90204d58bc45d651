"""Bulk download: img2dataset under guard, in processes of our own.

Takes a table of keys and URLs; writes `00000.parquet`, … with one row for every URL (key, url, status, reason, hashes and the raw
bytes, never re-encoded), each sealed by `00000.json`, and `ledger.json` with the counts. A sealed part is not fetched again,
except for failures when too few URLs gave an image. img2dataset's `Downloader` does the work (`worker.py`), through the opener of
`guard`; its resume, exit codes and re-encoding are not used, and what it loses track of is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.retrieve.guard import DownloadPolicy
from retrieve_or_generate.retrieve.ledger import check_success, judged, ledger, success
from retrieve_or_generate.retrieve.parts import Count, Part, Parts
from retrieve_or_generate.retrieve.worker import ASKED, PART, rows_of
from retrieve_or_generate.settings import DownloadSettings
from retrieve_or_generate.store import locked, remove_leftovers, write_json

__all__ = ["DOWNLOADS", "LEDGER", "DownloadPolicy", "download", "downloaded", "image_set_reason"]

LEDGER = "ledger.json"
DOWNLOADS = pa.schema([*(field for field in PART if field.name != "image"), ("part", pa.string())])


def download(
    urls: pa.Table,
    out: Path,
    policy: DownloadPolicy | None = None,
    *,
    settings: DownloadSettings | None = None,
    blocklist: Blocklist | None = None,
    processes: int = 1,
    part_rows: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """Fetch `urls` (columns `key`, each once, and `url`; `md5`, `sha256` and `id` where known) into parts under `out`.

    Gives what came of each, in order, with the columns of `DOWNLOADS`. `status` is one of `worker.TOLD`, `reason` a code and a
    detail, `verified` whether the bytes have the hash that the pool records (verified, unverified, mismatch; "" where there are no
    bytes). The blocklist is the user's own and the settings' by default; what stands on it is not asked for, and its bytes are
    kept nowhere. `progress` is told how many URLs are done.

    Raises:
        IncompleteError: a worker died or hung, or fewer URLs than `settings.least_success` gave an image. What is finished is kept;
            the same call goes on, and tries what failed again.
    """
    settings = settings or DownloadSettings()
    policy = policy or DownloadPolicy()
    policy = replace(
        policy, max_bytes=min(policy.max_bytes, settings.max_bytes), per_host=max(1, policy.per_host // processes)
    )
    blocklist = Blocklist.load(settings.blocklist) if blocklist is None else blocklist
    asked = _asked(urls)
    parts = [
        Part(asked.slice(at, part_rows), out / f"{at // part_rows:05d}.parquet")
        for at in range(0, asked.num_rows, part_rows)
    ]
    with locked(out):
        remove_leftovers(out)
        work = Parts(policy, settings, blocklist, processes)
        there = work.ensure(parts, Count(progress))
        found = judged(_told(parts), settings)
        if any(there) and success(ledger(found)) < settings.least_success:
            work.retry([part for part, before in zip(parts, there, strict=True) if before])
            found = judged(_told(parts), settings)
        counts = ledger(found)
        write_json(out / LEDGER, counts)
    check_success(counts, settings)
    return found


def _asked(urls: pa.Table) -> pa.Table:
    """The rows to fetch, with every column that a worker knows."""
    nothing = pa.nulls(urls.num_rows)
    return pa.table({name: urls[name] if name in urls.column_names else nothing for name in ASKED})


def _told(parts: list[Part]) -> pa.Table:
    """What came of every row, without the images."""
    tables = [part.read(DOWNLOADS.names[:-1]) for part in parts]
    named = [
        t.append_column("part", pa.repeat(part.path.name, t.num_rows)) for t, part in zip(tables, parts, strict=True)
    ]
    return pa.concat_tables([DOWNLOADS.empty_table(), *named])


def downloaded(out: Path, table: pa.Table) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every image of `table` (what `download` into `out` returned) that is ok, in its order."""
    start = 0
    for part in pc.value_counts(table["part"]):  # in order of appearance
        name, rows = part["values"].as_py(), part["counts"].as_py()
        told = table.slice(start, rows)
        wanted = set(told.filter(pc.equal(told["status"], "ok"))["key"].to_pylist())
        start += rows
        for some in rows_of(out / name, ["key", "image"]):
            for key, image in zip(some["key"].to_pylist(), some["image"].to_pylist(), strict=True):
                if key in wanted:
                    yield key, image


def image_set_reason(status: str) -> str:
    """Why a row with this status is not in an image set, as `image_set.REASONS` says it; "" for one whose image is there."""
    return {"ok": "", "failed": "dead_link"}.get(status, status)
