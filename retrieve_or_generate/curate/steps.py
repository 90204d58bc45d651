"""Decisions that a source takes on its own images besides those that all sources go through, and where among them they stand.

Every source's images are curated alike. A source may ask for more: that copies of the pool go, that of more images than are needed
some are chosen. Such a `Step` runs at one of three places, and what it found stands under its name in the set's record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from retrieve_or_generate.curate.described import Described
from retrieve_or_generate.curate.kinds import ArrayCache, Kind

if TYPE_CHECKING:
    from retrieve_or_generate.models import Clip

When = Literal["first", "scored", "last"]
"""Beside the test for evaluation images; after the filter by CLIP score, before the cap; when all is decided."""


@dataclass(frozen=True)
class Seen:
    """What a step can look with: the model and the copy descriptor of curation, images' bytes by key, and a cache for arrays."""

    clip: Clip
    kind: Kind
    read: Callable[[Sequence[str]], list[bytes]]
    cache: ArrayCache


Decision = tuple[np.ndarray, dict[str, Any]]
"""Which of the rows go, (n,) bool, and what the set's record says of it."""


@dataclass(frozen=True)
class Step:
    """`decide` looks at the rows that are left; those that go get `reason`. `follows_from` is part of what identifies the set."""

    name: str
    when: When
    reason: str
    follows_from: dict[str, Any]
    decide: Callable[[Described, Seen], Decision]


def run_steps(
    steps: Sequence[Step], when: When, described: Described, reasons: np.ndarray, seen: Seen
) -> dict[str, dict[str, Any]]:
    """Run those of `steps` whose place this is, one after another, and set the `reasons` of what goes; what they found, by name."""
    told = {}
    for step in steps:
        if step.when == when:
            rows = np.flatnonzero(reasons == "")
            goes, told[step.name] = step.decide(described.take(rows), seen)
            reasons[rows[goes]] = step.reason
    return told
