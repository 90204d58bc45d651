"""Looks at every image of a task: how many of each class, which cannot be read, how large they are, which are in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.executors import core_count
from retrieve_or_generate.pixels import UndecodableImage, decode
from retrieve_or_generate.progress import Bytes, Progress, amount
from retrieve_or_generate.tasks.base import SPLITS, Task
from retrieve_or_generate.tasks.split import Split

_CHUNK = 256
_NAMED = 5


@dataclass
class SplitCheck:
    """One split, or shift. `counts` are images by class id, `unreadable` keys with what is wrong, `sides` the shorter ones,
    `repeated` how many images have the bytes of one before them.
    """

    name: str
    counts: list[int]
    is_shift: bool = False
    looked_at: int = 0
    bytes: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    sides: Counter[int] = field(default_factory=Counter)
    repeated: int = 0

    @property
    def images(self) -> int:
        return sum(self.counts)

    @property
    def side_range(self) -> tuple[int, int, int]:
        """The smallest, the median and the largest shorter side, in pixels; zeros where no image could be read."""
        sides = sorted(self.sides.elements()) or [0]
        return sides[0], sides[len(sides) // 2], sides[-1]

    def line(self) -> str:
        """A line of the table."""
        least, median, most = self.side_range
        shown = [each for each in self.counts if each]
        a_class = f"{min(shown)} to {max(shown)}"
        size = amount(self.bytes, Bytes(self.bytes))
        sides = f"{least} {median} {most}"
        return f"{self.name:<12} {self.images:>8} {a_class:>11} {size:>8} {sides:>16} {len(self.unreadable):>10}"

    def remarks(self, class_names: Sequence[str]) -> Iterator[str]:
        """What the table does not say: images that were not read, classes without any, and the first unreadable ones."""
        if self.looked_at < self.images:
            yield f"{self.looked_at} of {self.images} images read"
        empty = [name for name, count in zip(class_names, self.counts, strict=True) if not count]
        if empty and self.is_shift:
            shown = len(class_names) - len(empty)
            yield f"a shift that shows {shown} of {len(class_names)} classes; it is measured among those"
        elif empty:
            yield f"no image of {len(empty)} classes ({_some(empty)})"
        if self.repeated:
            yield f"{self.repeated} images have the bytes of another one in it"
        if self.unreadable:
            told = [f"{key}: {problem}" for key, problem in self.unreadable.items()]
            yield f"{len(told)} images cannot be read ({_some(told)}); replace them or leave them out"


@dataclass(frozen=True)
class TaskCheck:
    """The three splits, then the shifts; `in_two` has, of two of them, how many images are in both, byte by byte."""

    task: Task
    splits: tuple[SplitCheck, ...]
    in_two: dict[str, int]

    @property
    def is_whole(self) -> bool:
        return not any(split.unreadable for split in self.splits)

    def lines(self) -> list[str]:
        """What `rog tasks TASK` prints."""
        names, templates = self.task.class_names, self.task.templates
        lines = [f"{self.task.name}: {len(names)} classes, {len(templates)} templates, {self.task.folder}"]
        lines += [f"  {note}" for note in self.task.notes]
        lines.append(
            f"{'split':<12} {'images':>8} {'a class':>11} {'bytes':>8} {'shorter side':>16} {'unreadable':>10}"
        )
        lines += [split.line() for split in self.splits]
        for split in self.splits:
            lines += [f"{split.name}: {told}" for told in split.remarks(names)]
        return lines + [f"{pair}: {count} images are in both" for pair, count in self.in_two.items()]

    def record(self) -> dict[str, Any]:
        """What `rog tasks --json` prints."""
        names = self.task.class_names
        splits = {}
        for split in self.splits:
            counts = dict(zip(names, split.counts, strict=True))
            told = {
                key: value for key, value in asdict(split).items() if key not in ("name", "sides", "counts", "is_shift")
            }
            splits[split.name] = {"images": split.images, "classes": counts, "sides": split.side_range} | told
        told = {
            "task": self.task.name,
            "classes": len(names),
            "templates": self.task.templates,
            "notes": self.task.notes,
        }
        return told | {"splits": splits, "in_two": self.in_two}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if names[_NAMED:] else "")


def check_task(task: Task, sample: int | None = None, progress: Progress | None = None) -> TaskCheck:
    """Read and decode every image, or at most `sample` of each split, evenly spread; list splits first, so that what is missing is
    told at once.

    Raises `UsageError` for what keeps a split from being listed: missing files, labels of no class.
    """
    splits = {name: task.split(name) for name in SPLITS}
    shifts = {name: task.shift(name) for name in task.shifts}
    checked, hashes = [], {}
    for name, split in (splits | shifts).items():
        counts = np.bincount(split.labels, minlength=len(task.class_names)).tolist()
        check = SplitCheck(name, counts, name in shifts)
        hashes[name] = set(_looked_at(split, check, sample, f"{task.name} {name}", progress))
        check.repeated = check.looked_at - len(hashes[name])
        checked.append(check)
    pairs = [*combinations(splits, 2), *product(splits, shifts)]
    in_two = {f"{one}, {other}": len(hashes[one] & hashes[other]) for one, other in pairs}
    return TaskCheck(task, tuple(checked), {pair: count for pair, count in in_two.items() if count})


def _looked_at(
    split: Split, check: SplitCheck, sample: int | None, what: str, progress: Progress | None
) -> Iterator[bytes]:
    """Fills `check`; the hash of each image."""
    count = min(sample or len(split), len(split))
    rows = [place * len(split) // count for place in range(count)]
    with ThreadPoolExecutor(core_count()) as threads:
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            for row, (digest, size, side, problem) in zip(
                part, threads.map(lambda row: _one(split, row), part), strict=True
            ):
                check.looked_at, check.bytes = check.looked_at + 1, check.bytes + size
                if problem:
                    check.unreadable[split.keys[row]] = problem
                else:
                    check.sides[side] += 1
                yield digest
            if progress:
                progress(f"check {what}", start + len(part), len(rows))


def _one(split: Split, row: int) -> tuple[bytes, int, int, str]:
    """Hash, bytes and shorter side of an image, and what is wrong with it."""
    try:
        data = split.images[row]
    except IntegrityError as error:
        return split.keys[row].encode(), 0, 0, str(error)
    digest = hashlib.sha256(data).digest()
    try:
        return digest, len(data), min(decode(data).shape[:2]), ""
    except UndecodableImage as error:
        return digest, len(data), 0, str(error)
