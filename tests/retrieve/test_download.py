"""Downloads with the real img2dataset from a server on loopback."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from web import web

from retrieve_or_generate.errors import IncompleteError, IntegrityError
from retrieve_or_generate.pocket.pictures import evaluation_split
from retrieve_or_generate.retrieve import download as module
from retrieve_or_generate.retrieve.download import DOWNLOADS, DownloadPolicy, download, downloaded


def table(urls: dict[str, str | None], md5: dict[str, str] | None = None) -> pa.Table:
    sums = [(md5 or {}).get(key) for key in urls]
    return pa.table(
        {"key": list(urls), "url": pa.array(urls.values(), pa.string()), "md5": pa.array(sums, pa.string())}
    )


def pictures(count: int) -> dict[str, bytes]:
    return {f"/{i}.jpg": row.jpeg for i, row in enumerate(evaluation_split("textures", "val")[:count])}


SERVED = pictures(8) | {"/text.jpg": b"no picture at all"}
PATHS = [*SERVED, "/gone", "/redirect", "/noai", "/slow", "/huge"]


@dataclass(frozen=True)
class Downloaded:
    out: Path
    urls: pa.Table
    found: pa.Table
    policy: DownloadPolicy
    asked: list[str]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloaded]:
    """One download by one process in parts of ten; the server stays up."""
    out = tmp_path_factory.mktemp("first")
    with web(SERVED) as (base, policy, asked):
        urls: dict[str, str | None] = {path: base + path for path in PATHS}
        urls |= {
            "file": "file:///etc/passwd",
            "closed": "http://127.0.0.1:1/",
            "null": None,
            "private": "http://10.0.0.1/a.jpg",
        }
        urls["changed"] = base + "/0.jpg"
        md5 = {"changed": "0" * 32, "/1.jpg": hashlib.md5(SERVED["/1.jpg"]).hexdigest()}
        asked_for = table(urls, md5)
        yield Downloaded(out, asked_for, download(asked_for, out, policy, part_rows=10), policy, asked)


def test_every_url_has_a_row_with_its_reason(first: Downloaded) -> None:
    assert first.found.schema == DOWNLOADS
    assert first.found.select(["key", "url"]).equals(first.urls.select(["key", "url"]))
    rows = first.found.to_pylist()
    assert [row["key"] for row in rows if row["status"] == "ok"] == list(SERVED)
    assert {
        row["key"]: f"{row['status']} {row['reason'].partition(':')[0]}" for row in rows if row["status"] != "ok"
    } == {
        "/gone": "failed http_404",
        "/redirect": "refused scheme",
        "/noai": "refused opt_out",
        "/slow": "failed timeout",
        "/huge": "refused too_large",
        "file": "refused scheme",
        "closed": "refused address",
        "null": "failed other",
        "private": "refused address",
        "changed": "failed changed",
    }


def test_raw_bytes_are_kept(first: Downloaded) -> None:
    assert dict(downloaded(first.out, first.found)) == SERVED
    sums = [hashlib.sha256(data).hexdigest() for data in SERVED.values()]
    assert first.found["sha256"].to_pylist()[: len(SERVED)] == sums


def test_a_second_call_fetches_nothing(first: Downloaded) -> None:
    asked, told = len(first.asked), list[int]()
    again = download(first.urls, first.out, first.policy, part_rows=10, progress=told.append)
    assert again.equals(first.found)
    assert len(first.asked) == asked
    assert told == [10, 19]


def test_parts_follow_from_the_urls_not_from_the_order_of_arrival(first: Downloaded, tmp_path: Path) -> None:
    download(first.urls, tmp_path, replace(first.policy, threads=1), part_rows=10, processes=2)
    for name in ("00000.parquet", "00001.parquet"):
        assert (tmp_path / name).read_bytes() == (first.out / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in first.out.iterdir())


def test_a_part_whose_bytes_changed_is_told(first: Downloaded, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first.out, tmp_path / "copy"))
    path = copy / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="bytes changed"):
        download(first.urls, copy, first.policy, part_rows=10)


def test_nothing_to_fetch(tmp_path: Path) -> None:
    assert download(table({}), tmp_path).num_rows == 0


def _die(*_: object) -> None:
    import os

    os._exit(9)


def _hang(*_: object) -> None:
    import time

    time.sleep(60)


@pytest.mark.parametrize(("work", "told"), [(_die, "died"), (_hang, "hung")])
def test_a_worker_that_dies_or_hangs_is_told_and_leaves_no_part(
    work: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_serve", work)
    monkeypatch.setattr(module, "_START_SECONDS", 3.0 if work is _hang else 60.0)
    with pytest.raises(IncompleteError, match=told):
        download(table({"a": "http://127.0.0.1:1/"}), tmp_path, DownloadPolicy(deadline_seconds=0.1))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
