"""What WordNet 3.0 says that a class is a kind of.

Reads `data.noun` and `index.noun` as WordNet (`dict/`) and NLTK (`corpora/wordnet/`) ship them; their format is wndb(5WN).
A synset's offset, which ImageNet's ids carry (`n02012849`), is the byte of `data.noun` at which its line begins: one seek reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from retrieve_or_generate.errors import IntegrityError, UsageError

_ENDINGS = (
    *(("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z")),
    *(("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
)
"""Ends of plurals and what stands there in the singular: the rules of WordNet's morphy(7WN) for nouns."""


@dataclass(frozen=True)
class Synset:
    """A line of `data.noun`: its words, the offsets of what it is a kind of, and of what it is an instance of."""

    offset: int
    words: tuple[str, ...]
    kind_of: tuple[int, ...]
    instance_of: tuple[int, ...]
    gloss: str

    @property
    def wnid(self) -> str:
        return f"n{self.offset:08d}"


@dataclass(frozen=True)
class Resolved:
    """A class's hypernym, and `choices`: what it was chosen from, for the record."""

    hypernym: str
    choices: dict[str, Any]


class WordNet:
    """The nouns in a folder. `UsageError` where there are none."""

    def __init__(self, folder: Path):
        self._data, self._index = folder / "data.noun", folder / "index.noun"
        if not self._data.is_file():
            raise UsageError(f"{folder}: no data.noun in it; give the folder of WordNet 3.0 that holds it")

    def synset(self, offset: int) -> Synset:
        """The synset that begins at a byte of `data.noun`; `IntegrityError` where none does."""
        with self._data.open("rb") as file:
            file.seek(offset)
            line = file.readline().decode("utf-8", errors="replace")
        try:
            return _parse(line, offset)
        except (ValueError, IndexError) as error:
            raise IntegrityError(
                f"{self._data}: no synset begins at byte {offset} (n{offset:08d}); is it the file of WordNet 3.0, whole?"
            ) from error

    @cached_property
    def _senses(self) -> dict[str, tuple[int, ...]]:
        """Offsets of each lemma's synsets, the most frequent sense first."""
        if not self._index.is_file():
            raise UsageError(
                f"{self._index}: missing; classes are looked up there by name. Put wnids.txt beside classnames.txt to do without"
            )
        senses = {}
        for line in self._index.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields = line.split()
            count = int(fields[2]) if len(fields) > 2 and fields[2].isdigit() else 0
            if not count or not all(offset.isdigit() for offset in fields[-count:]):
                raise IntegrityError(f"{self._index}: {line[:40]!r} is no line of WordNet's index of nouns")
            senses[fields[0]] = tuple(int(offset) for offset in fields[-count:])
        return senses

    def senses(self, name: str) -> tuple[int, ...]:
        """Offsets of the synsets that a name may mean, the most frequent first; of its singular, if it has none itself."""
        lemma = "_".join(name.lower().split())
        singulars = (lemma.removesuffix(end) + single for end, single in _ENDINGS if lemma.endswith(end))
        return next((self._senses[form] for form in (lemma, *singulars) if form in self._senses), ())

    def by_wnid(self, wnid: str) -> Resolved | None:
        """The hypernym of a synset; None for the root, which has none."""
        return self._resolved(self.synset(int(wnid[1:])), ())

    def by_name(self, name: str) -> Resolved | None:
        """The hypernym of a class by its name; None where it is no noun of WordNet's.

        Of several senses it is the first, which is the most frequent, that is a kind of something; names of persons and places
        are instances, and come after.
        """
        senses = [self.synset(offset) for offset in self.senses(name)]
        upward = [sense for sense in senses if sense.kind_of] or [sense for sense in senses if sense.instance_of]
        return self._resolved(upward[0], [sense for sense in senses if sense != upward[0]]) if upward else None

    def _resolved(self, chosen: Synset, others: Sequence[Synset]) -> Resolved | None:
        """Of several hypernyms the one that the file lists first, by the first of its words."""
        upward = [self.synset(offset) for offset in chosen.kind_of or chosen.instance_of]
        if not upward:
            return None
        choices: dict[str, Any] = {"synset": chosen.wnid, "hypernym_synset": upward[0].wnid}
        if others:
            choices |= {"meaning": chosen.gloss, "other_senses": {other.wnid: other.gloss for other in others}}
        if upward[1:]:
            choices["other_hypernyms"] = {other.wnid: _plain(other.words[0]) for other in upward[1:]}
        return Resolved(_plain(upward[0].words[0]), choices)


def _plain(word: str) -> str:
    return word.replace("_", " ")


def _parse(line: str, offset: int) -> Synset:
    """`offset file type w_cnt word lex_id … p_cnt pointer offset pos where … | gloss`; `w_cnt` is hexadecimal.

    `ValueError` or `IndexError` where the line is something else.
    """
    fields, _, gloss = line.partition("|")
    parts = fields.split()
    if parts[0] != f"{offset:08d}" or parts[2] != "n":
        raise ValueError(line)
    words_end = 4 + 2 * int(parts[3], 16)
    words, count, rest = tuple(parts[4:words_end:2]), int(parts[words_end]), parts[words_end + 1 :]
    if len(rest) != 4 * count or not words:
        raise ValueError(line)
    pointers = [(rest[i], int(rest[i + 1])) for i in range(0, 4 * count, 4)]
    return Synset(
        offset,
        words,
        tuple(to for symbol, to in pointers if symbol == "@"),
        tuple(to for symbol, to in pointers if symbol == "@i"),
        gloss.strip().split(";")[0],
    )
