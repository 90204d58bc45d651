"""Which alternatives captions meet: an alternative is met where all of its atoms are found.

Every atom is looked for in one pass; an alternative is thought of only where its longest atom, as a rule the rarest, was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from retrieve_or_generate.retrieve.caption_engines import EngineName, fastest_engine
from retrieve_or_generate.retrieve.caption_text import Semantics, Text, accepted, as_texts, to_fold


@dataclass(frozen=True)
class Alternative:
    """Atoms (distinct) that a caption must all have to be of `label`, and how this is told."""

    label: int
    told: str
    atoms: tuple[bytes, ...]


class Search:
    """Alternatives, those of a label next to each other, ready to be looked for."""

    def __init__(self, alternatives: Sequence[Alternative], semantics: Semantics, engine: EngineName | None):
        self.semantics = semantics
        self.labels = np.array([a.label for a in alternatives], np.int64)
        self.told = pa.array([a.told for a in alternatives], pa.string())
        numbers: dict[bytes, int] = {}
        rarest_first = [
            [numbers.setdefault(atom, len(numbers)) for atom in sorted(a.atoms, key=len, reverse=True)]
            for a in alternatives
        ]
        self.lengths = np.array([len(atom) for atom in numbers], np.int64)
        anchors = np.array([mine[0] for mine in rarest_first], np.int64)
        self.places = np.argsort(
            anchors, kind="stable"
        )  # alternatives by their anchor, those of anchor i from first[i]
        self.counts = np.bincount(anchors, minlength=len(numbers))
        self.first = np.cumsum(self.counts) - self.counts
        most = max(map(len, rarest_first), default=1)
        # (most − 1, alternatives): the atoms that must be there beside the anchor, −1 for none
        self.others = np.array([mine[1:] + [-1] * (most - len(mine)) for mine in rarest_first], np.int64).T
        self.to_fold = to_fold(numbers, semantics)
        self.engine = fastest_engine(list(numbers), engine) if numbers else None

    def pairs(self, captions: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Caption numbers and alternatives, (n,) int64 each, ordered: the first alternative of each label that a caption meets."""
        if self.engine is None or not len(captions):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        hits = np.concatenate([self._hits(text) for text in as_texts(captions, self.semantics, self.to_fold)])
        rows, places = self._met(np.sort(hits))
        labels = self.labels[places]
        new = np.ones(len(rows), bool)
        new[1:] = (rows[1:] != rows[:-1]) | (labels[1:] != labels[:-1])
        return rows[new], places[new]

    def _hits(self, text: Text) -> np.ndarray:
        """(n,) int64: caption number × number of atoms + atom, for every occurrence that counts."""
        assert self.engine is not None
        ends, found = self.engine.find(text.data)
        good, rows = accepted(text, ends - self.lengths[found], ends, self.semantics)
        return rows[good] * len(self.lengths) + found[good]

    def _met(self, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and alternatives, ordered, of which every atom is among the ordered `hits`; some come twice."""
        rows, found = np.divmod(hits, len(self.lengths))
        repeats = self.counts[found]
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        rows, places = np.repeat(rows, repeats), self.places[np.repeat(self.first[found], repeats) + within]
        for others in self.others:
            wanted = others[places]
            there = (wanted < 0) | _among(rows * len(self.lengths) + wanted, hits)
            rows, places = rows[there], places[there]
        keys = np.sort(rows * len(self.labels) + places)
        rows, places = np.divmod(keys, len(self.labels))
        return rows, places


def _among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """(n,) bool: whether each key is one of the ordered, of which there is at least one if there are keys."""
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return ordered[at] == keys
