"""Downloads with the real img2dataset from a server on loopback."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web import web

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.errors import IncompleteError, IntegrityError
from retrieve_or_generate.image_set import REASONS
from retrieve_or_generate.pixels import encode_png
from retrieve_or_generate.pocket.pictures import evaluation_split
from retrieve_or_generate.retrieve import parts as module
from retrieve_or_generate.retrieve import worker
from retrieve_or_generate.retrieve.download import (
    DOWNLOADS,
    LEDGER,
    DownloadPolicy,
    download,
    downloaded,
    image_set_reason,
)
from retrieve_or_generate.retrieve.worker import TOLD
from retrieve_or_generate.settings import DownloadSettings

NO_LIST = Blocklist()


def table(urls: dict[str, str | None], **known: dict[str, Any]) -> pa.Table:
    """Keys and URLs, and what is known of some keys."""
    columns = {"key": list(urls), "url": pa.array(urls.values(), pa.string())}
    return pa.table(columns | {name: [values.get(key) for key in urls] for name, values in known.items()})


def pictures(count: int) -> dict[str, bytes]:
    return {f"/{i}.jpg": row.jpeg for i, row in enumerate(evaluation_split("textures", "val")[:count])}


def md5_of(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def codes(found: pa.Table) -> dict[str, str]:
    """Status and reason code of every key that is not ok."""
    rows = [row for row in found.to_pylist() if row["status"] != "ok"]
    return {row["key"]: f"{row['status']} {row['reason'].partition(':')[0]}" for row in rows}


GOOD = pictures(8)
SERVED = GOOD | {
    "/text.jpg": b"no picture at all",
    "/empty.jpg": b"",
    "/cut.jpg": GOOD["/0.jpg"][:400],
    "/dot.png": encode_png(np.zeros((1, 1, 3), np.uint8)),
}
PATHS = [*GOOD, *(set(SERVED) - set(GOOD)), "/gone", "/redirect", "/noai", "/slow", "/huge"]
OTHERS = {
    "file": "file:///etc/passwd",
    "closed": "http://127.0.0.1:1/",
    "null": None,
    "blank": "",
    "private": "http://10.0.0.1/a.jpg",
}
BLOCKED = {
    "listed": "/3.jpg?listed",
    "by_id": "/3.jpg?id",
    "by_hash": "/3.jpg?hash",
    "hop": "/to/5.jpg",
    "content": "/7.jpg",
}


@dataclass(frozen=True)
class Downloaded:
    out: Path
    urls: pa.Table
    found: pa.Table
    policy: DownloadPolicy
    blocklist: Blocklist
    asked: list[str]

    def again(self, out: Path | None = None, **changes: Any) -> pa.Table:
        given = {"policy": self.policy, "blocklist": self.blocklist, "part_rows": 10} | changes
        return download(self.urls, out or self.out, **given)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloaded]:
    """One download by one process in parts of ten; the server stays up."""
    out = tmp_path_factory.mktemp("first")
    with web(SERVED) as (base, policy, asked):
        urls = {path: base + path for path in sorted(PATHS)} | OTHERS
        urls |= {"changed": base + "/0.jpg", "changed256": base + "/0.jpg", "odd": base + "/2.jpg"}
        urls |= {key: base + path for key, path in BLOCKED.items()} | {"hop": f"{base}/to/5.jpg?secret"}
        md5 = {"changed": "0" * 32, "/1.jpg": md5_of(GOOD["/1.jpg"]).upper(), "odd": "nan", "by_hash": "a" * 32}
        sha256 = {"changed256": "0" * 64, "/1.jpg": sha256_of(GOOD["/1.jpg"]), "/2.jpg": sha256_of(GOOD["/2.jpg"])}
        asked_for = table(urls, md5=md5, sha256=sha256, id={"by_id": -7, "/1.jpg": 5})
        blocklist = Blocklist.of(
            [base + BLOCKED["listed"], str(2**64 - 7), "a" * 32, f"{base}/5.jpg?secret", md5_of(GOOD["/7.jpg"])]
        )
        found = download(asked_for, out, policy, blocklist=blocklist, part_rows=10)
        yield Downloaded(out, asked_for, found, policy, blocklist, asked)


def test_every_url_has_a_row_with_its_reason(first: Downloaded) -> None:
    assert first.found.schema == DOWNLOADS
    assert first.found.select(["key", "url"]).equals(first.urls.select(["key", "url"]))
    rows = first.found.to_pylist()
    kept = [row["key"] for row in rows if row["status"] == "ok"]
    assert kept == [f"/{i}.jpg" for i in range(7)] + ["odd"]
    assert codes(first.found) == {
        "/7.jpg": "blocked content",
        "/gone": "failed http_404",
        "/redirect": "refused scheme",
        "/noai": "refused opt_out",
        "/slow": "failed timeout",
        "/huge": "refused too_large",
        "/text.jpg": "undecodable format",
        "/empty.jpg": "undecodable empty",
        "/cut.jpg": "undecodable broken",
        "/dot.png": "refused too_small",
        "file": "refused scheme",
        "closed": "refused address",
        "null": "refused scheme",
        "blank": "refused scheme",
        "private": "refused address",
        "changed": "mismatch md5",
        "changed256": "mismatch sha256",
        "listed": "blocked listed",
        "by_id": "blocked listed",
        "by_hash": "blocked listed",
        "hop": "blocked hop",
        "content": "blocked content",
    }


def test_what_is_blocked_by_url_hash_or_id_opens_no_socket(first: Downloaded) -> None:
    assert not {BLOCKED[key] for key in ("listed", "by_id", "by_hash")} & set(first.asked)
    assert "/5.jpg?secret" not in first.asked, "nor does what a redirect leads to"


def test_bytes_of_a_mismatch_or_of_a_blocked_image_are_kept_nowhere(first: Downloaded) -> None:
    for path in first.out.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert (row["image"] is not None) == (row["status"] == "ok")


def test_hashes_are_recorded_and_say_what_is_verified(first: Downloaded) -> None:
    rows = {row["key"]: row for row in first.found.to_pylist()}
    assert {key: row["verified"] for key, row in rows.items() if row["verified"] in ("verified", "mismatch")} == {
        "/1.jpg": "verified",
        "/2.jpg": "verified",
        "changed": "mismatch",
        "changed256": "mismatch",
    }
    assert rows["odd"]["verified"] == "unverified", "what is no hash verifies nothing"
    assert rows["/gone"]["verified"] == ""
    assert [rows[path]["sha256"] for path in GOOD] == [sha256_of(data) for data in GOOD.values()]
    assert (rows["/0.jpg"]["width"], rows["/0.jpg"]["height"]) == (32, 32)


def test_raw_bytes_are_kept(first: Downloaded) -> None:
    expected = {path: data for path, data in GOOD.items() if path != "/7.jpg"} | {"odd": GOOD["/2.jpg"]}
    assert dict(downloaded(first.out, first.found)) == expected


def test_the_ledger_adds_up(first: Downloaded) -> None:
    counts = json.loads((first.out / LEDGER).read_text())
    assert counts["requested"] == first.urls.num_rows == counts["kept"] + sum(counts["reasons"].values())
    assert (counts["kept"], counts["kept_verified"], counts["kept_unverified"]) == (8, 2, 6)
    assert counts["reasons"]["failed http_404"] == 1


def test_one_url_in_many_rows_is_asked_for_once(first: Downloaded) -> None:
    assert first.asked.count("/0.jpg") == 2, "once a part"


def test_a_second_call_fetches_nothing(first: Downloaded) -> None:
    asked, told = len(first.asked), list[int]()
    again = first.again(progress=told.append)
    assert again.equals(first.found)
    assert len(first.asked) == asked
    assert told == [10, 20, 30]


def test_parts_follow_from_the_urls_not_from_the_order_of_arrival(first: Downloaded, tmp_path: Path) -> None:
    first.again(tmp_path, policy=replace(first.policy, threads=1), processes=2)
    for name in ("00000.parquet", "00001.parquet", "00002.parquet", LEDGER):
        assert (tmp_path / name).read_bytes() == (first.out / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in first.out.iterdir())


def test_a_part_whose_bytes_changed_is_told(first: Downloaded, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first.out, tmp_path / "copy"))
    path = copy / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="bytes changed"):
        first.again(copy)


def test_a_blocklist_that_grew_removes_bytes_and_one_that_shrank_asks_again(first: Downloaded, tmp_path: Path) -> None:
    copy, count = Path(shutil.copytree(first.out, tmp_path / "copy")), len(first.asked)
    grown = Blocklist(first.blocklist.urls, first.blocklist.digests | {sha256_of(GOOD["/0.jpg"])}, first.blocklist.ids)
    found = first.again(copy, blocklist=grown)
    assert codes(found) == codes(first.found) | {"/0.jpg": "blocked listed"}
    assert GOOD["/0.jpg"] not in dict(downloaded(copy, found)).values()
    assert all(GOOD["/0.jpg"] not in path.read_bytes() for path in copy.glob("*.parquet"))
    assert len(first.asked) == count
    found = first.again(copy, blocklist=Blocklist(urls=first.blocklist.urls))
    assert set(codes(first.found)) - set(codes(found)) == {"by_id", "/7.jpg", "content"}
    assert codes(found)["by_hash"] == "mismatch md5"
    assert set(first.asked[count:]) == {"/0.jpg", "/3.jpg?hash", "/3.jpg?id", "/7.jpg"}


def test_only_failures_are_tried_again(tmp_path: Path) -> None:
    with web(GOOD) as (base, policy, asked):
        paths = ["/0.jpg", "/1.jpg?busy=1", "/2.jpg?busy=2", "/3.jpg?later=1", "/gone", "/noai"]
        found = download(table({path: base + path for path in paths}), tmp_path, policy, blocklist=NO_LIST)
    assert codes(found) == {
        "/2.jpg?busy=2": "failed http_503",
        "/gone": "failed http_404",
        "/noai": "refused opt_out",
    }
    assert {path: asked.count(path) for path in paths} == dict(zip(paths, (1, 2, 2, 2, 1, 1), strict=True))


def test_too_few_images_end_incomplete_and_the_next_call_retries_failures_alone(tmp_path: Path) -> None:
    half = DownloadSettings(least_success=0.5)
    with web(GOOD) as (base, policy, asked):
        policy = replace(policy, retries=0)
        paths = ["/0.jpg", "/1.jpg?busy=1", "/2.jpg?busy=1", "/gone"]
        urls = table({path: base + path for path in paths})
        with pytest.raises(IncompleteError, match=r"only 1 of 4 URLs .* 50% .*failed http_503 2, failed http_404 1"):
            download(urls, tmp_path, policy, settings=half, blocklist=NO_LIST)
        assert json.loads((tmp_path / LEDGER).read_text())["kept"] == 1
        found = download(urls, tmp_path, policy, settings=half, blocklist=NO_LIST)
        assert dict(downloaded(tmp_path, found)) == {path: GOOD[path.partition("?")[0]] for path in paths[:3]}
        assert sorted(asked) == sorted([*paths, *paths[1:3]])
        assert download(urls, tmp_path, policy, settings=half, blocklist=NO_LIST).equals(found)
        assert len(asked) == 6


def test_settings_say_which_images_are_used(tmp_path: Path) -> None:
    with web(GOOD) as (base, policy, _):
        urls = {"sum": base + "/0.jpg", "none": base + "/1.jpg"} | {f"same{i}": f"{base}/2.jpg?{i}" for i in range(3)}
        asked = table(urls, md5={"sum": md5_of(GOOD["/0.jpg"])})
        strict = DownloadSettings(unverified="drop", placeholder_urls=3)
        found = download(asked, tmp_path / "strict", policy, settings=strict, blocklist=NO_LIST)
        placeholder = {f"same{i}": "placeholder shared" for i in range(3)}
        assert codes(found) == {"none": "refused unverified"} | placeholder
        assert dict(downloaded(tmp_path / "strict", found)) == {"sum": GOOD["/0.jpg"]}
        sized = DownloadSettings(least_success=0, least_pixels=32 * 32 + 1)
        small = download(asked, tmp_path / "small", policy, settings=sized, blocklist=NO_LIST)
        assert set(codes(small).values()) == {"refused too_small"}


def test_the_users_own_blocklist_counts_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with web(GOOD) as (base, policy, asked):
        (tmp_path / "cache/blocklist.txt").write_text(f"{base}/0.jpg\n")
        (tmp_path / "mine.txt").write_text(f"{base}/1.jpg\n")
        settings = DownloadSettings(blocklist=str(tmp_path / "mine.txt"))
        urls = table({path: base + path for path in list(GOOD)[:3]})
        found = download(urls, tmp_path / "out", policy, settings=settings)
        assert codes(found) == {"/0.jpg": "blocked listed", "/1.jpg": "blocked listed"}
        assert asked == ["/2.jpg"]


def test_hosts_take_turns() -> None:
    urls = [
        "http://a.example/1",
        "http://a.example/2",
        "http://b.example/1",
        "http://a.example/3",
        "http://b.example/2",
    ]
    assert worker._mixed(urls) == [urls[0], urls[2], urls[1], urls[4], urls[3]]


def test_nothing_to_fetch(tmp_path: Path) -> None:
    assert download(table({}), tmp_path, blocklist=NO_LIST).num_rows == 0


def test_every_status_is_a_reason_of_an_image_set() -> None:
    assert {image_set_reason(status) for status in TOLD} <= {"", *REASONS}
    assert [status for status in TOLD if not image_set_reason(status)] == ["ok"]


def _die(*_: object) -> None:
    os._exit(9)


def _hang(*_: object) -> None:
    time.sleep(60)


@pytest.mark.parametrize(("work", "told"), [(_die, "died"), (_hang, "hung")])
def test_a_worker_that_dies_or_hangs_is_told_and_leaves_no_part(
    work: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "serve", work)
    monkeypatch.setattr(module, "_START_SECONDS", 3.0 if work is _hang else 60.0)
    policy = DownloadPolicy(deadline_seconds=0.1, most_wait_seconds=0)
    with pytest.raises(IncompleteError, match=told):
        download(table({"a": "http://127.0.0.1:1/"}), tmp_path, policy, blocklist=NO_LIST)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_interrupt_ends_all_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "serve", _hang)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download(
            table(dict.fromkeys("abcd", "http://127.0.0.1:1/")),
            tmp_path,
            blocklist=NO_LIST,
            part_rows=1,
            processes=2,
        )
    assert time.monotonic() - started < 20
    assert multiprocessing.active_children() == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


WEAK_AT, STUCK_AT = GOOD["/2.jpg"], GOOD["/4.jpg"]


def _weak(pipe: Connection, policy: DownloadPolicy, blocklist: Blocklist, stuck: bool = False) -> None:
    """A worker whose decoder ends the process at one image, and with `stuck` never ends at another."""
    decode = worker.decode

    def weak(data: bytes, most_pixels: int) -> np.ndarray:
        if data == WEAK_AT:
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == STUCK_AT and stuck:
            time.sleep(60)
        return decode(data, most_pixels)

    worker.decode = weak
    worker.serve(pipe, policy, blocklist)


def _weak_and_stuck(pipe: Connection, policy: DownloadPolicy, blocklist: Blocklist) -> None:
    _weak(pipe, policy, blocklist, stuck=True)


@pytest.mark.parametrize(
    ("work", "lost"), [(_weak, ["/2.jpg"]), pytest.param(_weak_and_stuck, ["/2.jpg", "/4.jpg"], marks=pytest.mark.slow)]
)
def test_an_image_that_ends_the_decoder_costs_itself_alone(
    work: object, lost: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "serve", work)
    monkeypatch.setattr(module, "_DECODE_SECONDS", 5.0)
    with web(GOOD) as (base, policy, asked):
        found = download(table({path: base + path for path in GOOD}), tmp_path, policy, blocklist=NO_LIST)
    assert codes(found) == dict.fromkeys(lost, "undecodable crashed")
    assert dict(downloaded(tmp_path, found)) == {path: data for path, data in GOOD.items() if path not in lost}
    assert len(asked) == len(GOOD), "what was fetched is not fetched again"


_KILLED = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.retrieve.download import DownloadPolicy, download
port = int(sys.argv[2])
if __name__ == "__main__":
    policy = DownloadPolicy(threads=2, allowed_endpoints=frozenset({("127.0.0.1", port)}))
    download(pq.read_table(sys.argv[1] + ".urls"), Path(sys.argv[1]), policy, blocklist=Blocklist(), part_rows=2)
"""


@pytest.mark.slow
def test_killed_anywhere_and_run_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed after every part in turn, on one folder; the workers end with it."""
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    with web(GOOD) as (base, policy, _):
        urls = table({path: base + path for path in GOOD})
        download(urls, tmp_path / "whole", policy, blocklist=NO_LIST, part_rows=2)
        pq.write_table(urls, tmp_path / "out.urls")
        for part in range(3):
            command = [sys.executable, str(script), str(tmp_path / "out"), base.rpartition(":")[2]]
            process = subprocess.Popen(command, start_new_session=True)
            while not (tmp_path / f"out/{part:05d}.parquet").exists():
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
            process.wait()
        found = download(urls, tmp_path / "out", policy, blocklist=NO_LIST, part_rows=2)
    assert dict(downloaded(tmp_path / "out", found)) == GOOD
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        if name != ".lock":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
