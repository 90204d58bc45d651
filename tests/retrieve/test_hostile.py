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
from retrieve_or_generate.experiment import DownloadSettings
from retrieve_or_generate.retrieve.download import download, downloaded
from retrieve_or_generate.retrieve.guard import DownloadPolicy, NotFetched, Session, fetch
from retrieve_or_generate.retrieve.ledger import ledger


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, DownloadPolicy]]:
    with hostile_web() as (base, endpoints):
        yield base, replace(POLICY, allowed_endpoints=endpoints, resolver=resolved)


def resolved(host: str, port: int) -> list[str]:
    """Numbers stand for themselves; every name is unknown."""
    if host.replace(".", "").isdigit() or ":" in host:
        return [host]
    raise OSError("NXDOMAIN")


def outcome(url: str, policy: DownloadPolicy) -> tuple[str, float]:
    """What came of it (ok for any bytes), and the seconds it took."""
    started = time.monotonic()
    try:
        fetch(url, Session(policy))
        told = "ok"
    except NotFetched as error:
        told = str(error).partition(":")[0]
    return told, time.monotonic() - started


def test_there_are_many() -> None:
    assert len(BEHAVIOURS) >= 64


def test_every_behaviour_comes_to_its_outcome_in_time(web: tuple[str, DownloadPolicy]) -> None:
    base, policy = web
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(BEHAVIOURS, pool.map(lambda name: outcome(f"{base}/{name}", policy), BEHAVIOURS), strict=True))
    expected = {name: one.outcome.replace("undecodable ", "ok ").partition(" ") for name, one in BEHAVIOURS.items()}
    wanted = {name: "ok" if first == "ok" else f"{first} {rest}" for name, (first, _, rest) in expected.items()}
    assert {name: told for name, (told, _) in found.items()} == wanted
    assert max(seconds for _, seconds in found.values()) < DEADLINE + 1


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
    names = [*BEHAVIOURS, "https"]
    urls = [*(f"{base}/{name}" for name in BEHAVIOURS), base.replace("http:", "https:")]
    settings = DownloadSettings(placeholder_urls=1000)
    found = download(
        pa.table({"key": names, "url": urls}), tmp_path, policy, settings=settings, blocklist=Blocklist(), part_rows=200
    )
    told = {row["key"]: f"{row['status']} {row['reason'].partition(':')[0]}".strip() for row in found.to_pylist()}
    assert told == {name: one.outcome for name, one in BEHAVIOURS.items()} | {"https": "failed tls"}
    counts = ledger(found)
    assert counts["requested"] == len(names) == counts["kept"] + sum(counts["reasons"].values())
    kept = dict(downloaded(tmp_path, found))
    assert [name for name, one in BEHAVIOURS.items() if one.outcome == "ok"] == list(kept)
    assert set(kept.values()) == {IMAGE}
