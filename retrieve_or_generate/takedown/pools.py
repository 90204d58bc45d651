"""Images taken out of a pool's own shards. Its embeddings and metadata keep their rows, so that nothing loses its place.

The pool keeps its fingerprint, too: its seal goes on naming the files as they were, beside the checksums of what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.pocket.places import POOL_SEAL, pool_place
from retrieve_or_generate.pool.layout import BEFORE_TAKEDOWN, Pool, open_pool
from retrieve_or_generate.pool.parts import find_parts
from retrieve_or_generate.pool.tars import IMAGE_SUFFIXES, Member, image_members, members, sample_key
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.store import locked, read_json, sha256_of, write_json, write_tar
from retrieve_or_generate.takedown.found import Found
from retrieve_or_generate.takedown.swap import settle, staging, swap


@dataclass(frozen=True)
class Shelf:
    """A pool and the images that were found to go: names of members, by shard of images and sha256."""

    pool: Pool
    places: dict[Path, dict[str, str]] = field(default_factory=dict)

    def find(self, wanted: Blocklist, progress: Progress | None) -> list[Found]:
        """The wanted images, by hash or by the URL of their row. Every image is read."""
        found = []
        for done, shard in enumerate(self.pool.shards, 1):
            if shard.images is None:
                continue
            urls = self._urls(shard.first_row, shard.rows) if wanted.urls else {}
            for member, data in _images(shard.images):
                key, sha256 = sample_key(member.name)[0], hashlib.sha256(data).hexdigest()
                one = Found.of(data, urls.get(key, ""))
                if wanted.blocks(sha256=one.sha256, md5=one.md5, url=one.url):
                    found.append(one)
                    self.places.setdefault(shard.images, {})[member.name] = sha256
            if progress:
                progress(f"images of {self.pool.name}", done, len(self.pool.shards))
        return found

    def _urls(self, first: int, rows: int) -> dict[str, str]:
        table = self.pool.metadata(range(first, first + rows), ("key", "url")).to_pydict()
        return {str(key): url or "" for key, url in zip(table["key"], table["url"], strict=True)}

    def remove(self, shas: frozenset[str]) -> int:
        """Rewrite the shards that hold images with these hashes; how many there were."""
        count = 0
        for path, images in self.places.items():
            names = {name for name, sha256 in images.items() if sha256 in shas}
            if names:
                with locked(path.parent.parent):
                    _rewrite(path, names)
            count += len(names)
        image_members.cache_clear()
        return count


def _images(path: Path) -> Iterator[tuple[Member, bytes]]:
    with path.open("rb") as file:
        for member in members(path):
            if sample_key(member.name)[1] in IMAGE_SUFFIXES:
                file.seek(member.offset)
                yield member, file.read(member.size)


def _rewrite(path: Path, names: set[str]) -> None:
    """The shard without these members, and the seal of its part of the pool with the new checksum, where there is one."""
    part, relative = path.parent.parent, path.relative_to(path.parent.parent).as_posix()
    staged = staging(part)
    write_tar(staged / relative, _others(path, names))
    changed = [relative]
    if (part / POOL_SEAL).is_file():
        record, new = read_json(part / POOL_SEAL), staged / relative
        record.setdefault(BEFORE_TAKEDOWN, dict(record["files"]))
        if relative in record["files"]:
            record["files"][relative] = {"bytes": new.stat().st_size, "sha256": sha256_of(new)}
        write_json(staged / POOL_SEAL, record)
        changed.append(POOL_SEAL)
    swap(part, changed)


def _others(path: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for member in members(path):
            if member.name not in names:
                file.seek(member.offset)
                yield member.name, file.read(member.size)


def open_shelf(name: str) -> Shelf:
    """The pool, an exchange in it that was cut short settled first."""
    found = find_parts(pool_place() if name == "pocket" else Path(name))
    for part in found[1] if found else ():
        settle(part)
    return Shelf(open_pool(name))
