"""A web that does whatever it likes: every behaviour comes to its one outcome, in time and within the cap."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hostile import BEHAVIOURS, DEADLINE, IMAGE, MAX_BYTES, POLICY, hostile_web

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.retrieve.download import download, downloaded
from retrieve_or_generate.retrieve.guard import DownloadPolicy, NotFetched, Session, fetch
from retrieve_or_generate.retrieve.ledger import ledger
from retrieve_or_generate.settings import DownloadSettings


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, DownloadPolicy]]:
    with hostile_web() as (base, endpoints):
        yield base, replace(POLICY, allowed_endpoints=endpoints, resolver=resolved)


def resolved(host: str, port: int) -> list[str]:
    """Numbers stand for themselves; every name is unknown."""
    if host.replace(".", "").isdigit() or ":" in host:
        return [host]
    raise OSError("NXDOMAIN")


def outcome(url: str, policy: DownloadPolicy) -> str:
    """What came of it; ok for any bytes."""
    try:
        fetch(url, Session(policy))
        return "ok"
    except NotFetched as error:
        return str(error).partition(":")[0]


def expected(name: str) -> str:
    """What a fetch alone can tell: whether bytes are an image is found out later."""
    told = BEHAVIOURS[name].outcome
    return "ok" if told.startswith("undecodable") else told


SLOW = [name for name in BEHAVIOURS if BEHAVIOURS[name].outcome == "failed timeout"]
QUICK = [name for name in BEHAVIOURS if name not in SLOW]


def test_there_are_many() -> None:
    assert len(BEHAVIOURS) >= 100
    assert len(SLOW) >= 6


def test_every_behaviour_comes_to_its_outcome(web: tuple[str, DownloadPolicy]) -> None:
    base, policy = web
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda name: outcome(f"{base}/{name}", policy), QUICK)
        assert dict(zip(QUICK, found, strict=True)) == {name: expected(name) for name in QUICK}


def test_what_never_ends_is_ended_at_the_deadline(web: tuple[str, DownloadPolicy]) -> None:
    base, policy = web
    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        hasty = replace(policy, deadline_seconds=DEADLINE)
        found = list(pool.map(lambda name: outcome(f"{base}/{name}", hasty), SLOW))
    assert time.monotonic() - started < DEADLINE + 2
    assert found == ["failed timeout"] * len(SLOW)


def test_no_answer_takes_more_memory_than_the_cap(web: tuple[str, DownloadPolicy]) -> None:
    base, policy = web
    tracemalloc.start()
    for name in ("endless_body", "endless_chunks", "endless_continue", "length_huge", "chunk_size_huge"):
        outcome(f"{base}/{name}", policy)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 4 * MAX_BYTES
    tracemalloc.stop()


def test_a_download_of_all_of_them_has_one_row_and_one_reason_each(
    web: tuple[str, DownloadPolicy], tmp_path: Path
) -> None:
    base, policy = web
    names = [*QUICK, "https"]
    urls = [*(f"{base}/{name}" for name in QUICK), base.replace("http:", "https:")]
    settings = DownloadSettings(placeholder_urls=1000)
    found = download(
        pa.table({"key": names, "url": urls}), tmp_path, policy, settings=settings, blocklist=Blocklist(), part_rows=200
    )
    told = {row["key"]: f"{row['status']} {row['reason'].partition(':')[0]}".strip() for row in found.to_pylist()}
    assert told == {name: BEHAVIOURS[name].outcome for name in QUICK} | {"https": "failed tls"}
    counts = ledger(found)
    assert counts["requested"] == len(names) == counts["kept"] + sum(counts["reasons"].values())
    kept = dict(downloaded(tmp_path, found))
    assert [name for name, one in BEHAVIOURS.items() if one.outcome == "ok"] == list(kept)
    assert set(kept.values()) == {IMAGE}
