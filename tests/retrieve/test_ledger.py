"""The ledger: what can only be told of the whole, and counts that always add up."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.retrieve.download import DOWNLOADS
from retrieve_or_generate.retrieve.ledger import check_success, judged, ledger, success
from retrieve_or_generate.settings import DownloadSettings


def found(rows: list[dict[str, Any]]) -> pa.Table:
    blank = {field.name: "" if field.type == pa.string() else 0 for field in DOWNLOADS}
    return pa.Table.from_pylist([blank | row for row in rows], DOWNLOADS)


def image(sha256: str, url: str, verified: str = "unverified", **more: str) -> dict[str, str]:
    return {"sha256": sha256, "url": url, "status": "ok", "verified": verified} | more


def statuses(rows: list[dict[str, Any]], **given: Any) -> list[str]:
    return judged(found(rows), DownloadSettings(**given))["status"].to_pylist()


def test_one_image_under_many_urls_is_a_placeholder() -> None:
    same = [image("a", f"http://h.example/{i}.jpg") for i in range(3)]
    assert statuses([*same, image("b", "http://h.example/b.jpg")], placeholder_urls=3) == ["placeholder"] * 3 + ["ok"]
    assert statuses(same, placeholder_urls=4) == ["ok"] * 3
    told = judged(found(same), DownloadSettings(placeholder_urls=3))["reason"].to_pylist()
    assert told == ["shared: 3 URLs give this one image"] * 3


def test_spellings_of_one_url_are_one_url() -> None:
    same = [
        image("a", url) for url in ("http://H.example/a.jpg", "https://h.example:443/%61.jpg", "http://h.example/a.jpg")
    ]
    assert statuses(same, placeholder_urls=2) == ["ok"] * 3


def test_images_that_are_not_used_count_as_well() -> None:
    rows = [image("a", f"http://h.example/{i}.jpg", status="mismatch", verified="mismatch") for i in range(2)]
    assert statuses([*rows, image("a", "http://h.example/9.jpg")], placeholder_urls=3) == [
        "mismatch",
        "mismatch",
        "placeholder",
    ]


def test_unverified_images_may_be_unwanted() -> None:
    rows = [image("a", "http://h.example/a"), image("b", "http://h.example/b", "verified")]
    assert statuses(rows) == ["ok", "ok"]
    assert statuses(rows, unverified="drop") == ["refused", "ok"]


def test_nothing_is_all_of_nothing() -> None:
    counts = ledger(judged(found([]), DownloadSettings()))
    assert counts == {"requested": 0, "kept": 0, "reasons": {}, "kept_verified": 0, "kept_unverified": 0}
    check_success(counts, DownloadSettings(least_success=1))


def test_too_few_images_are_told_with_the_commonest_reasons() -> None:
    rows = [image("a", "http://h.example/a"), *[{"status": "failed", "reason": "dns: h.example does not resolve"}] * 9]
    counts = ledger(found(rows))
    assert success(counts) == 0.1
    check_success(counts, DownloadSettings(least_success=0.1))
    with pytest.raises(IncompleteError, match=r"only 1 of 10 URLs gave an image, less than the 20% .*\(failed dns 9\)"):
        check_success(counts, DownloadSettings(least_success=0.2))


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (["http_404: gone", "timeout: 10 s"], "run it again to retry failures, or set a lower floor"),
        (["http_404: gone"], "none of them ends otherwise another time; set a lower floor"),
    ],
)
def test_only_what_may_end_otherwise_is_worth_another_try(reasons: list[str], words: str) -> None:
    counts = ledger(found([{"status": "failed", "reason": reason} for reason in reasons]))
    with pytest.raises(IncompleteError, match=words):
        check_success(counts, DownloadSettings())


STATUS = st.sampled_from(["ok", "failed", "refused", "blocked", "mismatch", "undecodable"])
REASON = st.sampled_from(["timeout: not done", "http_404: h: 1", "scheme: a\nb", "crashed"])
ROWS = st.lists(st.tuples(STATUS, REASON, st.sampled_from("abc"), st.integers(0, 9), st.booleans()), max_size=40)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(2, 5), st.sampled_from(["keep", "drop"]))
def test_requested_is_kept_and_each_reason(
    rows: list[tuple[str, str, str, int, bool]], least: int, unverified: str
) -> None:
    table = found(
        [
            image(sha, f"http://h.example/{number}", "verified" if known else "unverified")
            if status == "ok"
            else {"status": status, "reason": reason}
            for status, reason, sha, number, known in rows
        ]
    )
    told = judged(table, DownloadSettings(placeholder_urls=least, unverified=unverified))
    counts = ledger(told)
    assert counts["requested"] == len(rows) == counts["kept"] + sum(counts["reasons"].values())
    assert (
        counts["kept"] == told["status"].to_pylist().count("ok") == counts["kept_verified"] + counts["kept_unverified"]
    )
    assert judged(told, DownloadSettings(placeholder_urls=least, unverified=unverified)).equals(told)
