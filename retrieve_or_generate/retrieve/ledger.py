"""What became of every URL of a download, and whether that is enough: requested = kept + each reason, always."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from retrieve_or_generate.blocklist import spelled
from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.experiment import DownloadSettings


def judged(found: pa.Table, settings: DownloadSettings) -> pa.Table:
    """`found` after what can only be told of the whole: placeholders, and images without a hash where those are not wanted."""
    rows = found.select(["url", "status", "reason", "sha256", "verified"]).to_pylist()
    pairs = {(row["sha256"], spelled(row["url"] or "")) for row in rows if row["sha256"]}
    urls_of = Counter(sha256 for sha256, _ in pairs)
    settled = [_settled(row, urls_of[row["sha256"]], settings) for row in rows]
    for name in ("status", "reason"):
        values = pa.array([row[name] for row in settled], pa.string())
        found = found.set_column(found.column_names.index(name), found.schema.field(name), values)
    return found


def _settled(row: dict[str, Any], urls: int, settings: DownloadSettings) -> dict[str, Any]:
    """The row, out of the set if `urls` different URLs gave its image and those are too many."""
    if row["status"] == "ok" and urls >= settings.placeholder_urls:
        return row | {"status": "placeholder", "reason": f"shared: {urls} URLs give this one image"}
    if row["status"] == "ok" and row["verified"] == "unverified" and settings.unverified == "drop":
        return row | {"status": "refused", "reason": "unverified: the pool records no hash for it"}
    return row


def ledger(found: pa.Table) -> dict[str, Any]:
    """Counts that add up: rows requested and kept, each reason (status and code), and how many of the kept are verified."""
    rows = found.select(["status", "reason", "verified"]).to_pylist()
    reasons = Counter(f"{row['status']} {row['reason'].partition(':')[0]}" for row in rows if row["status"] != "ok")
    kept = [row["verified"] for row in rows if row["status"] == "ok"]
    counts = {"requested": len(rows), "kept": len(kept), "reasons": dict(sorted(reasons.items()))}
    assert counts["requested"] == len(kept) + sum(reasons.values())
    return counts | {"kept_verified": kept.count("verified"), "kept_unverified": kept.count("unverified")}


def success(counts: dict[str, Any]) -> float:
    """Share of the URLs that gave an image that is used; of none asked for, all did."""
    return float(counts["kept"] / counts["requested"]) if counts["requested"] else 1.0


def check_success(counts: dict[str, Any], settings: DownloadSettings) -> None:
    """Raise `IncompleteError` with the commonest reasons when fewer URLs gave an image than the settings ask for."""
    if success(counts) >= settings.least_success:
        return
    common = sorted(counts["reasons"].items(), key=lambda item: (-item[1], item[0]))[:4]
    told = ", ".join(f"{name} {count}" for name, count in common)
    raise IncompleteError(
        f"only {counts['kept']} of {counts['requested']} URLs gave an image, less than the {settings.least_success:.0%} of "
        f"retrieve.download.least_success ({told}); run it again to retry failures, or set a lower floor"
    )
