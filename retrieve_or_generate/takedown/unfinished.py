"""Images that a download has fetched and no image set holds yet: the parts under `.downloads/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.takedown.found import Found

_DOWNLOADS, _PARTS = ".downloads", "[0-9]*.parquet"
_COLUMNS = ["url", "sha256", "md5"]


def _parts(folders: Sequence[Path]) -> Iterator[tuple[Path, list[Found]]]:
    """Each part with the images that it holds; one that cannot be read holds what nobody knows, and goes."""
    for folder in folders:
        for part in sorted(path for place in folder.rglob(_DOWNLOADS) for path in place.glob(_PARTS)):
            try:
                rows = pq.read_table(part, columns=_COLUMNS).to_pylist()
            except (pa.ArrowException, OSError):
                _drop(part)
                continue
            yield part, [Found(row["sha256"], row["md5"] or "", row["url"] or "") for row in rows if row["sha256"]]


def _drop(part: Path) -> None:
    """The next run fetches its rows again, all but those on the blocklist."""
    part.with_suffix(".json").unlink(missing_ok=True)
    part.unlink()


def find(folders: Sequence[Path], wanted: Blocklist) -> list[Found]:
    return [
        one
        for _, images in _parts(folders)
        for one in images
        if wanted.blocks(sha256=one.sha256, md5=one.md5, url=one.url)
    ]


def remove(folders: Sequence[Path], shas: frozenset[str]) -> None:
    """Drop the parts that hold an image with one of these hashes."""
    for part, images in _parts(folders):
        if any(one.sha256 in shas for one in images):
            _drop(part)
