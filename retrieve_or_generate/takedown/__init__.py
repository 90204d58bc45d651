"""Takes an image out of everything: image sets, pictures made of it, finished and unfinished downloads, a pool's shards.

Reads and writes image set folders, runs, a pool, and the captions that models gave images, in place; appends to the blocklist
first, so that nothing brings the image back. What was trained on it is marked `stale.json` and listed; a run loses its seal,
results and report, and `rog compare` makes anew what followed from the image. Each folder goes from its old state to the new one
at once (`swap.py`), and the same call goes on with one that was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from retrieve_or_generate.blocklist import Blocklist, add_to_blocklist
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune.decoded import forget_decoded
from retrieve_or_generate.kept_texts import CAPTIONS, forget
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.store import locked
from retrieve_or_generate.takedown import memory, pools, runs, trials, unfinished
from retrieve_or_generate.takedown.found import Found
from retrieve_or_generate.takedown.sets import SetFolder, affected_sets, find_sets

__all__ = ["Takedown", "takedown"]


@dataclass(frozen=True)
class Takedown:
    """What a takedown did. `listed` are the new entries of the blocklist; `problems` say where the image may still be."""

    sha256: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    sets: dict[Path, int] = field(default_factory=dict)
    pool_images: int = 0
    trials: tuple[Path, ...] = ()
    runs: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def takedown(hash: str, folders: Sequence[Path], pool: str | None = None, progress: Progress | None = None) -> Takedown:
    """Remove the image with this sha256 or md5, or every image that came from this URL, from all that lies below `folders`.

    With `pool` its shards of images are searched, too; a pool of millions of images is read whole. The hash, the image's other hash
    and the URLs it came from go to the blocklist. Trials that trained on the image, or on one made of it, are marked.

    Raises `UsageError` for what is no hash and for a folder in use or not there; nothing is removed then.
    """
    wanted = _wanted(hash)
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    with ExitStack() as locks:
        places = runs.find_runs(folders)
        for run in places:  # no comparison goes on meanwhile
            locks.enter_context(locked(run))
        shelf = pools.open_shelf(pool) if pool else None
        problems: list[str] = []
        sets, found = _search(find_sets(folders), wanted, problems)
        found += memory.recall(wanted) + unfinished.find(folders, wanted)
        if shelf is not None:
            found += shelf.find(_widened(wanted, found), progress)
        memory.remember(found)
        listed = add_to_blocklist(dict.fromkeys([hash.strip(), *(entry for one in found for entry in one.entries)]))
        shas = frozenset(one.sha256 for one in found)
        affected = affected_sets(sets, shas)
        stale = trials.mark_stale(folders, affected, shas)
        touched = runs.withdraw(places, [one.folder for one in affected])
        removed = _remove(affected, problems)
        unfinished.remove(folders, shas)
        forget(CAPTIONS, shas)
        if shas:
            forget_decoded()
        count = shelf.remove(shas) if shelf is not None else 0
    return Takedown(tuple(sorted(shas)), tuple(listed), removed, count, tuple(stale), tuple(touched), tuple(problems))


def _wanted(hash: str) -> Blocklist:
    told = f"{hash!r}: give the sha256 (64 hex digits) or md5 (32) of the image, or its URL"
    try:
        wanted = Blocklist.of([hash])
    except UsageError:
        raise UsageError(told) from None
    if wanted.ids:
        raise UsageError(told)
    return wanted


def _widened(wanted: Blocklist, found: Sequence[Found]) -> Blocklist:
    """What is wanted, and the hashes that it has elsewhere; a URL may have given several images."""
    return replace(wanted, digests=wanted.digests | {one.sha256 for one in found})


def _search(places: Sequence[Path], wanted: Blocklist, problems: list[str]) -> tuple[list[SetFolder], list[Found]]:
    """The sets that can be read, and the wanted images in them."""
    sets, found = [], []
    for place in places:
        image_set = SetFolder(place)
        try:
            image_set.check()
            found += image_set.find(wanted)
            sets.append(image_set)
        except IntegrityError as error:
            problems.append(_damaged(place, error))
    return sets, found


def _remove(affected: dict[SetFolder, frozenset[str]], problems: list[str]) -> dict[Path, int]:
    """Images removed, by set; a damaged set is left as it is, and said."""
    removed = {}
    for image_set, keys in affected.items():
        try:
            if count := image_set.remove(keys):
                removed[image_set.folder] = count
        except IntegrityError as error:
            problems.append(_damaged(image_set.folder, error))
    return removed


def _damaged(folder: Path, error: IntegrityError) -> str:
    return f"the image may still be in {folder}, which is damaged: delete it ({error})"
