"""What was taken down before: `takedowns.json` in the cache folder, hashes and URLs, no image.

A takedown that is called by an md5 or a URL goes on by it after the last byte of the image is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.store import cache_folder, locked, read_json, write_json
from retrieve_or_generate.takedown.found import Found

_FILE, _LOCK = "takedowns.json", ".takedowns.lock"


def _known() -> set[Found]:
    path = cache_folder() / _FILE
    return {Found(**one) for one in read_json(path)} if path.is_file() else set()


def recall(wanted: Blocklist) -> list[Found]:
    """What was found of the image before."""
    return [one for one in _known() if wanted.blocks(sha256=one.sha256, md5=one.md5, url=one.url)]


def remember(found: Iterable[Found]) -> None:
    """Keep what was found of images whose bytes were still there; of the others it is known already."""
    with locked(cache_folder() / _LOCK, wait=True):
        known = _known()
        if new := {one for one in found if one.md5} - known:
            write_json(cache_folder() / _FILE, [asdict(one) for one in sorted(known | new)])
