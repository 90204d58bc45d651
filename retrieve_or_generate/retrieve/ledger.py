"""What became of every URL of a download, and whether that is enough: requested = kept + each reason, always."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrieve_or_generate.blocklist import spelled
from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.retrieve.worker import is_transient
from retrieve_or_generate.settings import DownloadSettings


def judged(found: pa.Table, settings: DownloadSettings) -> pa.Table:
    """`found` after what can only be told of the whole: placeholders, and images without a hash where those are not wanted."""
    shared = _shared(found, settings.placeholder_urls)
    ok = pc.equal(found["status"], "ok")
    place = pc.index_in(found["sha256"], pa.array(shared, pa.string()))
    counts = pa.array(list(shared.values()), pa.int64()).take(place.combine_chunks()).cast(pa.string())
    told = pc.binary_join_element_wise("shared: ", counts, " URLs give this one image", "")
    found = _where(found, pc.and_(ok, pc.is_valid(place)), "placeholder", told)
    if settings.unverified == "drop":
        unverified = pc.and_(pc.equal(found["status"], "ok"), pc.equal(found["verified"], "unverified"))
        found = _where(found, unverified, "refused", "unverified: the pool records no hash for it")
    return found


def _shared(found: pa.Table, least: int) -> dict[str, int]:
    """Images (sha256) that at least so many different URLs gave, and how many."""
    several = [
        count["values"].as_py()
        for count in pc.value_counts(found["sha256"])
        if count["counts"].as_py() >= least and count["values"].as_py()
    ]
    rows = found.select(["sha256", "url"]).filter(pc.is_in(found["sha256"], pa.array(several, pa.string())))
    pairs = {(row["sha256"], spelled(row["url"])) for row in rows.to_pylist()}
    urls_of = Counter(sha256 for sha256, _ in pairs)
    return {sha256: urls for sha256, urls in sorted(urls_of.items()) if urls >= least}


def _where(found: pa.Table, rows: pa.ChunkedArray, status: str, reason: pa.ChunkedArray | str) -> pa.Table:
    """`found` with another status and reason in these rows."""
    for name, value in (("status", status), ("reason", reason)):
        place = found.column_names.index(name)
        found = found.set_column(place, found.schema.field(name), pc.if_else(rows, value, found[name]))
    return found


def ledger(found: pa.Table) -> dict[str, Any]:
    """Counts that add up: rows requested and kept, each reason (status and code), and how many of the kept are verified."""
    code = pc.replace_substring_regex(found["reason"], "(?s):.*", "")
    told = pc.binary_join_element_wise(found["status"], pc.if_else(pc.equal(code, ""), found["verified"], code), " ")
    counts = {count["values"].as_py(): count["counts"].as_py() for count in pc.value_counts(told)}
    kept = {how: counts.pop(f"ok {how}", 0) for how in ("verified", "unverified")}
    total = sum(kept.values())
    assert found.num_rows == total + sum(counts.values())
    return {
        "requested": found.num_rows,
        "kept": total,
        "reasons": dict(sorted(counts.items())),
        "kept_verified": kept["verified"],
        "kept_unverified": kept["unverified"],
    }


def success(counts: dict[str, Any]) -> float:
    """Share of the URLs that gave an image that is used; of none asked for, all did."""
    return float(counts["kept"] / counts["requested"]) if counts["requested"] else 1.0


def check_success(counts: dict[str, Any], settings: DownloadSettings) -> None:
    """Raise `IncompleteError` with the commonest reasons when fewer URLs gave an image than the settings ask for."""
    if success(counts) >= settings.least_success:
        return
    common = sorted(counts["reasons"].items(), key=lambda item: (-item[1], item[0]))[:4]
    told = ", ".join(f"{name} {count}" for name, count in common)
    again = any(is_transient(*name.split(" ", 1)) for name in counts["reasons"])
    way_out = "run it again to retry failures, or set" if again else "none of them ends otherwise another time; set"
    raise IncompleteError(
        f"only {counts['kept']} of {counts['requested']} URLs gave an image, less than the {settings.least_success:.0%} of "
        f"retrieve.download.least_success ({told}); {way_out} a lower floor"
    )
