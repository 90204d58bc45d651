"""The contract of a task: class names, templates, three splits, and test sets that are shifted from it.

What reads the files of a task (`layout`, and a module for each kind of them) is apart from what it is. Beside the class names may
lie `synonyms.tsv` (name, tab, synonym), `queries.tsv` (what captions must say of a class: `tasks.queries`) and `wnids.txt` (WordNet
ids of the classes, as ImageNet has them). Class ids are places in the list of names, never the order of folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.store import content_key
from retrieve_or_generate.tasks.digests import split_digest
from retrieve_or_generate.tasks.queries import CaptionQuery
from retrieve_or_generate.tasks.split import Reader, Split

__all__ = ["SPLITS", "Reader", "Split", "SplitName", "Task"]

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Task:
    """What CLIP is adapted to. `templates` have "{}" where the class name goes (`templates.filled`).

    `readers` say where the splits lie, `shifts` where test sets do that show the same classes, or some of them, otherwise.
    `folder` is where the task lies, for messages; `notes` are what its user should know of it.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    folder: Path
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rewrites: dict[str, CaptionQuery] = field(default_factory=dict)
    wnids: tuple[str, ...] = ()
    readers: Mapping[SplitName, Reader] = field(default_factory=dict)
    shifts: Mapping[str, Reader] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def split(self, name: SplitName) -> Split:
        """List one split; a `UsageError` names the file that is missing or damaged, or a label of no class."""
        if name not in self.readers:
            raise UsageError(f"task {self.name}: no split {name!r} (there are: {', '.join(self.readers) or 'none'})")
        return self.readers[name].read()

    def shift(self, name: str) -> Split:
        """List a shifted test set. Its labels are the task's class ids; classes that it does not show have no image.

        `UsageError` where it shows one class alone, since a choice among one is always right.
        """
        if name not in self.shifts:
            raise unknown_name(f"shift of task {self.name}", name, self.shifts)
        split = self.shifts[name].read()
        if len(shown := np.unique(split.labels)) < 2:
            only = self.class_names[shown[0]]
            raise UsageError(
                f"shift {name} of task {self.name}: all images are of {only!r}; give it two classes or more"
            )
        return split

    @cached_property
    def caption_queries(self) -> dict[int, CaptionQuery]:
        """What captions must say, by label: the class name where `queries.tsv` says nothing of the class."""
        return {
            label: self.rewrites.get(name) or CaptionQuery.any_of([name]) for label, name in enumerate(self.class_names)
        }

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over class names, templates, rewritten caption queries and every image of the three splits with its label.

        The same images have the same one in every layout that gives them the same keys. Shifts are not of it: they change nothing
        that is trained (`shift_fingerprints`).
        """
        splits = [split_digest(self.split(name)) for name in SPLITS]
        rewrites = [{name: query.lines for name, query in self.rewrites.items()}] if self.rewrites else []
        return content_key([self.class_names, self.templates, splits, *rewrites])

    @cached_property
    def shift_fingerprints(self) -> dict[str, str]:
        """Of every shift a hash over its images and their labels."""
        return {name: split_digest(self.shift(name)) for name in self.shifts}
