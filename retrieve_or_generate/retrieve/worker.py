"""The process that a part of a download runs in: img2dataset fetches through the guarded opener, then every image is looked at.

It may die or hang without us: bytes are fetched first, into a scratch folder, and decoded afterwards, so that an image that ends
the process costs itself and nothing else. A part has one row for every URL asked for, in their order; it is the same whatever the
order of arrival.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.executors import end_with_parent
from retrieve_or_generate.pixels import UndecodableImage, decode
from retrieve_or_generate.retrieve.guard import DownloadPolicy, GuardedOpener, Refused, Session, check_url
from retrieve_or_generate.settings import DownloadSettings

ASKED = ("key", "url", "md5", "sha256", "id")
"""What is known of a row to fetch; all but key and url may be None."""

_TEXTS = ("key", "url", "status", "reason", "sha256", "md5", "verified")
PART = pa.schema(
    [*((name, pa.string()) for name in _TEXTS), ("width", pa.int32()), ("height", pa.int32()), ("image", pa.binary())]
)
TOLD = ("ok", "blocked", "refused", "failed", "mismatch", "placeholder", "undecodable")
"""What may become of a URL, in the order in which it is looked for."""

ROWS_AT_ONCE = 16  # in memory, each with an image of up to `max_bytes`
_TRANSIENT = re.compile(
    r"timeout|dns|connection|tls|bad_response|incomplete|rate_limited|lost|other|http_(408|425|429|5\d\d)"
)
_INPUT = pa.schema([("own_key", pa.string()), ("url", pa.string())])
_URLS, _IMAGES, _ROWS, _FETCHED = "urls.arrow", "images", "rows.jsonl", "fetched.json"
_UNUSED = ("albumentations", "wandb")  # img2dataset loads them for what is not asked of it: nine tenths of its start
_DIGITS = {"md5": 32, "sha256": 64}


@dataclass(frozen=True)
class Job:
    """Rows with the names of `ASKED`; a scratch folder; and where the part is written.

    `deadly` are the rows whose images ended a process before.
    """

    rows: list[dict[str, Any]]
    folder: Path
    target: Path
    settings: DownloadSettings
    deadly: frozenset[int] = frozenset()


def is_transient(status: str, reason: str) -> bool:
    """Whether another try may end otherwise: no answer, a busy server, damage on the way. Refusals and 404 stay."""
    return status == "failed" and _TRANSIENT.fullmatch(reason.partition(":")[0]) is not None


def serve(pipe: Connection, policy: DownloadPolicy, blocklist: Blocklist) -> None:
    """The life of a worker: jobs come through `pipe`, and beats, errors and ends go back.

    A beat is ("beat", row), the row whose image is looked at next, −1 while fetching. The opener is set for the whole process, so
    it has to be one of its own.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset would load it, and does as well without
    sys.modules |= {name: ModuleType(name) for name in _UNUSED}
    lock, session = threading.Lock(), Session(policy, blocklist)

    def tell(what: str, value: int | str = -1) -> None:
        with lock:
            pipe.send((what, value))

    urllib.request.install_opener(GuardedOpener(session, lambda: tell("beat")))
    with suppress(EOFError):
        while True:
            job: Job = pipe.recv()
            try:
                _write_part(job, _fetched(job, session), blocklist, tell)
                tell("done")
            except Exception as error:  # no room, above all: the parent says it in one line
                tell("error", f"{type(error).__name__}: {error}")


def _refusal(row: dict[str, Any], blocklist: Blocklist) -> str:
    """Status and reason of a row that no socket is opened for, or ""."""
    if blocklist.blocks(url=row["url"], md5=row["md5"], sha256=row["sha256"], id=row["id"]):
        return "blocked listed: on the blocklist, by its URL, hash or id"
    try:
        check_url(row["url"] or "")
    except Refused as refused:
        return str(refused)
    return ""


def _fetched(job: Job, session: Session) -> dict[str, list[Any]]:
    """For every URL that was asked for, in whichever row: its error or "", and where its bytes lie in the file of images."""
    path = job.folder / _FETCHED
    if not path.exists():
        urls = {row["url"]: None for row in job.rows if not _refusal(row, session.blocklist)}
        path.write_text(json.dumps(_fetch_in_rounds(list(urls), job.folder, session)))
    found: dict[str, list[Any]] = json.loads(path.read_text())
    return found


def _fetch_in_rounds(urls: list[str], folder: Path, session: Session) -> dict[str, list[Any]]:
    """All, then what may end otherwise, until it did or was tried often enough."""
    policy, waited, tries = session.policy, 0.0, Counter[str]()
    found: dict[str, list[Any]] = {}
    pending = urls
    while pending:
        found |= _run_img2dataset(pending, folder, policy)
        lost = ["failed lost: img2dataset wrote no row for it", 0, 0]
        errors = {url: found.setdefault(url, lost)[0] for url in pending}
        tries.update(url for url, error in errors.items() if not error.startswith("failed rate_limited"))
        pending = [url for url in pending if _again(errors[url]) and tries[url] <= policy.retries]
        turn = max((tries[url] for url in pending), default=0)
        pause = policy.retry_seconds * 2 ** max(turn - 1, 0)
        pause = max(pause, session.hosts.shortest_wait(_host(url) for url in pending))
        waited += pause
        if waited > policy.most_wait_seconds:
            break
        if pending:
            time.sleep(pause)
    return found


def _again(error: str) -> bool:
    status, _, reason = error.partition(" ")
    return is_transient(status, reason)


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or ""


def _mixed(urls: list[str]) -> list[str]:
    """Hosts take turns, so that threads do not queue for one host while others are idle."""
    turns = Counter[str]()
    order = []
    for place, url in enumerate(urls):
        host = _host(url)
        order.append((turns[host], place))
        turns[host] += 1
    return [urls[place] for _, place in sorted(order)]


class _Keeper:
    """What img2dataset hands its samples to: bytes into one file as they come, and a line on each."""

    def __init__(self, shard_id: int, output_folder: str, *_: object):
        self._images = (Path(output_folder) / _IMAGES).open("ab")
        self._rows = (Path(output_folder) / _ROWS).open("a")

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        data, error = img_str or b"", meta["error_message"] or ""
        if error and error.partition(" ")[0] not in TOLD:
            error = f"failed other: {error[:200]}"
        line = {"own_key": meta["own_key"], "found": [error, self._images.tell(), len(data)]}
        self._images.write(data)
        self._rows.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._images.close()
        self._rows.close()


def _run_img2dataset(urls: list[str], folder: Path, policy: DownloadPolicy) -> dict[str, list[Any]]:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    downloader = Downloader(
        sample_writer_class=_Keeper,
        resizer=Resizer(256, "no", False, disable_all_reencoding=True),
        thread_count=policy.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=_INPUT.names,
        timeout=policy.deadline_seconds,
        number_sample_per_shard=max(len(urls), 2),
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    order = _mixed(urls)
    with pa.ipc.new_file(str(folder / _URLS), _INPUT) as writer:
        writer.write_table(pa.table([[str(place) for place in range(len(order))], order], schema=_INPUT))
    (folder / _ROWS).write_text("")
    downloader.download_shard((0, str(folder / _URLS)))
    lines = [json.loads(line) for line in (folder / _ROWS).read_text().splitlines()]
    return {order[int(line["own_key"])]: line["found"] for line in lines}


def part_writer(path: Path) -> pq.ParquetWriter:
    """Writes `PART` tables, one row group each; images as they are, since they do not compress."""
    packed = {name: "none" if name == "image" else "zstd" for name in PART.names}
    return pq.ParquetWriter(path, PART, compression=packed, use_dictionary=False, write_statistics=False)


def _write_part(job: Job, fetched: dict[str, list[Any]], blocklist: Blocklist, tell: Any) -> None:
    with part_writer(job.target) as writer, (job.folder / _IMAGES).open("ab+") as images:
        for start in range(0, len(job.rows), ROWS_AT_ONCE):
            rows = []
            for place, asked in enumerate(job.rows[start : start + ROWS_AT_ONCE], start):
                tell("beat", place)
                rows.append(_row(asked, place, job, fetched, images, blocklist))
            writer.write_table(pa.Table.from_pylist(rows, PART))


def _row(
    asked: dict[str, Any],
    place: int,
    job: Job,
    fetched: dict[str, list[Any]],
    images: BinaryIO,
    blocklist: Blocklist,
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_TEXTS, "") | {"key": asked["key"], "url": asked["url"]}
    row |= {"width": 0, "height": 0, "image": None}
    error, offset, size = fetched.get(asked["url"], ["", 0, 0])
    error = _refusal(asked, blocklist) or error
    if error:
        status, _, reason = error.partition(" ")
        return row | {"status": status, "reason": reason}
    images.seek(offset)
    data = images.read(size)
    row |= {"sha256": hashlib.sha256(data).hexdigest(), "md5": hashlib.md5(data, usedforsecurity=False).hexdigest()}
    row["verified"], told = verified(asked, row)
    if blocklist.blocks(sha256=row["sha256"], md5=row["md5"]):
        return row | {"status": "blocked", "reason": "content: its hash is on the blocklist"}
    if row["verified"] == "mismatch":
        return row | {"status": "mismatch", "reason": told}
    if place in job.deadly:
        return row | {"status": "undecodable", "reason": "crashed: decoding it ended the process"}
    return row | _looked_at(data, job.settings)


def verified(asked: dict[str, Any], row: dict[str, Any]) -> tuple[str, str]:
    """verified, unverified or mismatch, by every hash that the pool records; and what differs."""
    known = 0
    for name, digits in _DIGITS.items():
        recorded = str(asked[name] or "").strip().lower()
        if len(recorded) != digits:
            continue
        known += 1
        if recorded != row[name]:
            return "mismatch", f"{name}: {row[name]}, not {recorded}"
    return ("verified" if known else "unverified"), ""


def _looked_at(data: bytes, settings: DownloadSettings) -> dict[str, Any]:
    try:
        height, width = decode(data, settings.most_pixels).shape[:2]
    except UndecodableImage as error:
        return {"status": "undecodable", "reason": str(error)}
    size = {"width": width, "height": height}
    if width * height < settings.least_pixels:
        told = f"too_small: {width}×{height}, fewer than {settings.least_pixels} pixels"
        return {"status": "refused", "reason": told, **size}
    return {"status": "ok", "reason": "", "image": data, **size}


def rows_of(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """A part, `ROWS_AT_ONCE` rows at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            yield pa.Table.from_batches([batch])
