"""As many synthetic images of each class as a given set has: rounds of requests until enough of them are fit for the filter.

The rule stands in `requests.py`. What is missing is known from the same looks and decisions that curation takes afterwards, and
which it is handed: nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from retrieve_or_generate.curate.curation import Looked, look
from retrieve_or_generate.curate.described import Described
from retrieve_or_generate.curate.score import places
from retrieve_or_generate.curate.steps import Decision, Seen, Step
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models import Clip
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.synthesize.prompts import HoldsModel, Strategy
from retrieve_or_generate.synthesize.requests import ROUNDS, TRIES, fit_needed, missing, round_requests
from retrieve_or_generate.synthesize.units import Maker, Making, Shard, cut, fill, read_rows
from retrieve_or_generate.tasks.base import Task

_SHOWN = 3  # classes that a message names


def no_more_step(counts: np.ndarray) -> Step:
    """No more images of a class than `counts[c]`, the best of them.

    A late image can be a better copy of one that several others were copies of, which then are none: a class may have more than
    were asked for.
    """

    def decide(left: Described, seen: Seen) -> Decision:
        over = places(left.scores, left.labels, left.keys) >= counts[left.labels]
        return over, {"over": int(over.sum())}

    return Step("matching", "scored", "class_cap", {"counts": counts.tolist()}, decide)


@dataclass
class Matching:
    """The rounds of one set. `wanted[c]` images of class c are to be left by the filter; `of` is what the images follow from."""

    task: Task
    strategy: Strategy
    making: Making
    maker: Maker
    clip: Clip
    curation: CurateSettings
    wanted: np.ndarray
    of: dict[str, Any]
    steps: Sequence[Step] = ()
    shards: list[Shard] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._needed = fit_needed(self.wanted, self.curation.keep_fraction)
        self._asked = np.zeros_like(self._needed)
        self._ask(self._needed)

    def _ask(self, more: np.ndarray) -> list[Shard]:
        """The next round, as shards."""
        requests = round_requests(len(self.rounds), self.task, self.strategy, self._asked, more)
        if isinstance(self.strategy, HoldsModel):
            self.strategy.rest()
        new = cut(requests, self.making.settings.shard_size, len(self.shards), self.of)
        self._asked += more
        self.rounds.append(len(requests))
        self.shards += new
        return new

    def top_up(self, progress: Progress | None = None) -> Looked:
        """Make shards, round by round, until no class lacks any; what curation has seen of them then.

        Classes that still lack some after the last round are an error that names them or, where classes that are too small may be
        left out, `unfilled`.
        """
        new = self.shards
        while True:
            fill(self.making, new, self.maker, progress=progress)
            looked = self._look(progress)
            more = self._missing(looked)
            if not more.any():
                return looked
            if len(self.rounds) > ROUNDS:
                self._give_up(looked, more)
                return looked
            new = self._ask(more)

    def _look(self, progress: Progress | None) -> Looked:
        told = partial(progress, "images looked at") if progress else None
        return look(
            self.making.out,
            read_rows(self.making.out, self.shards),
            task=self.task,
            clip=self.clip,
            settings=self.curation,
            steps=self.steps,
            progress=told,
        )

    def _missing(self, looked: Looked) -> np.ndarray:
        classes, left = len(self.wanted), looked.fit
        least = -np.inf if self.curation.least_score is None else self.curation.least_score
        fit = np.bincount(left.labels, minlength=classes)
        reaching = np.bincount(left.labels[left.scores >= least], minlength=classes)
        return missing(fit, self._needed, reaching, self.wanted)

    def _give_up(self, looked: Looked, more: np.ndarray) -> None:
        if self.curation.on_short_class == "error" or (more > 0)[self.wanted > 0].all():
            raise UsageError(self._too_few(looked, more))
        self.unfilled = [self.task.class_names[label] for label in np.flatnonzero(more).tolist()]

    def _too_few(self, looked: Looked, more: np.ndarray) -> str:
        """Which classes lack how many, what became of theirs, and what to do."""
        table = looked.table
        reasons = dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))
        reasons |= dict(zip(looked.described.keys.tolist(), looked.reasons.tolist(), strict=True))
        labels = np.array(table["label"].to_pylist())
        why = np.array([reasons[key] for key in table["key"].to_pylist()])
        told = []
        for label in np.flatnonzero(more)[:_SHOWN].tolist():
            names, counts = np.unique(why[(labels == label) & (why != "")], return_counts=True)
            lost = ", ".join(f"{count} {name}" for name, count in zip(names.tolist(), counts.tolist(), strict=True))
            name = self.task.class_names[label]
            told.append(f"{name!r} lacks {more[label]} of {self._needed[label]}" + f" ({lost})" * bool(lost))
        others = int((more > 0).sum()) - len(told)
        also = f" and {others} more classes" if others else ""
        return (
            f"{self.making.out}: {'; '.join(told)}{also}, after {ROUNDS} rounds of new prompts and {TRIES} tries at each flagged "
            "image: too few are fit. Choose more varied prompts (synthesize.prompts), or leave such classes out, for every source, "
            "with curate.on_short_class=exclude"
        )
