"""What a language model is shown so that it goes on with a picture's description: an instruction, three examples, the query.

After SynCLR (2312.17742, section 3.1) and appendix C.1 of 2406.05184. A class is asked for alone, with a relation ("next to"), with
a background, or, where classes are textures, as a texture:

    For each line, write a short caption of a picture that shows it.
    otter => an otter floats on its back and looks at the camera
    …
    beetle =>

The examples, relations and backgrounds are lists in files; ours lie in `lists/`, and a user's folder may replace any of them:

    object.tsv, texture.tsv   name, tab, caption
    background.tsv            name, tab, background, tab, caption
    relation.tsv              name, tab, relation, tab, caption
    backgrounds.txt           one a line, for every class; or class, tab, background
    relations.txt             one a line

Lines that begin with `#` are comments. It stands apart from the strategy that uses it because the pocket world's language model is
trained on the same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.store import content_key

Kind = Literal["object", "relation", "background", "texture"]

SHARES: Mapping[Kind, float] = {"object": 0.44, "relation": 0.11, "background": 0.45}
"""Of the kinds, where classes are objects (the code of 2406.05184)."""

EXAMPLES = 3
INSTRUCTION = "For each line, write a short caption of a picture that shows it."
ARROW = " =>"

_OURS = Path(__file__).parent / "lists"
_COLUMNS: Mapping[Kind, int] = {"object": 2, "texture": 2, "background": 3, "relation": 3}
_FILES = (*(f"{kind}.tsv" for kind in _COLUMNS), "backgrounds.txt", "relations.txt")


@dataclass(frozen=True)
class Example:
    """What stands before the arrow, and a caption of it."""

    asked: str
    caption: str

    @property
    def line(self) -> str:
        return f"{self.asked}{ARROW} {self.caption}"


@dataclass(frozen=True)
class Query:
    """One thing to ask: its `kind`, the relation or background `beside` the class or nothing, and the whole `text`."""

    kind: Kind
    beside: str
    text: str


@dataclass(frozen=True)
class Lists:
    """Examples by kind, relations, backgrounds for every class (key "") and for classes of their own."""

    examples: Mapping[Kind, tuple[Example, ...]]
    relations: tuple[str, ...]
    backgrounds: Mapping[str, tuple[str, ...]]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all of it, in its order."""
        told = {kind: [example.line for example in examples] for kind, examples in self.examples.items()}
        return content_key([INSTRUCTION, EXAMPLES, dict(SHARES), told, self.relations, dict(self.backgrounds)])

    def query(self, name: str, called: str, is_texture: bool, rng: np.random.Generator) -> Query:
        """Draw a kind, what stands beside the class `name`, which is written as `called`, and the examples that go before."""
        kinds = list(SHARES)
        kind: Kind = "texture" if is_texture else kinds[int(rng.choice(len(kinds), p=list(SHARES.values())))]
        beside = ""
        if kind == "relation":
            beside = _one(self.relations, rng)
        elif kind == "background":
            beside = _one(self.backgrounds.get(name) or self.backgrounds[""], rng)
        pool = self._others(kind, name)
        shown = [pool[i] for i in rng.choice(len(pool), EXAMPLES, replace=False)]
        return Query(kind, beside, in_context(shown, asked(called, beside)))

    def _others(self, kind: Kind, name: str) -> tuple[Example, ...]:
        """The examples that say nothing of the class itself, which would be repeated; all where those are too few."""
        others = tuple(one for one in self.examples[kind] if name.casefold() not in one.line.casefold())
        return others if len(others) >= EXAMPLES else self.examples[kind]


def asked(called: str, beside: str = "") -> str:
    """What stands before the arrow."""
    return f"{called}, {beside}" if beside else called


def in_context(shown: Sequence[Example], query: str) -> str:
    """The text that a language model goes on with; it ends with the arrow."""
    return "\n".join([INSTRUCTION, *(example.line for example in shown), query + ARROW])


def _one(items: Sequence[str], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def read_lists(folder: Path | None = None) -> Lists:
    """Ours, with what `folder` holds in their place. A `UsageError` names the line that is not understood."""
    own: dict[str, Path] = {}
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; it is to hold one or more of {', '.join(_FILES)}")
        own = {name: folder / name for name in _FILES if (folder / name).is_file()}
        if not own:
            raise UsageError(f"{folder}: none of {', '.join(_FILES)} in it")
    at = {name: own.get(name, _OURS / name) for name in _FILES}
    relations = tuple(line for _, line in _lines(at["relations.txt"]))
    if not relations:
        raise UsageError(f"{at['relations.txt']}: empty; put one relation a line, such as: next to")
    return Lists(
        {kind: _examples(at[f"{kind}.tsv"], columns) for kind, columns in _COLUMNS.items()},
        relations,
        _backgrounds(at["backgrounds.txt"]),
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without comments and empty ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip()


def _examples(path: Path, columns: int) -> tuple[Example, ...]:
    found = []
    for number, line in _lines(path):
        parts = [" ".join(part.split()) for part in line.split("\t")]
        if len(parts) != columns or not all(parts):
            raise UsageError(f"{path}, line {number}: {columns} columns with tabs between are wanted, the caption last")
        found.append(Example(", ".join(parts[:-1]), parts[-1]))
    distinct = tuple(dict.fromkeys(found))
    if len(distinct) < EXAMPLES:
        raise UsageError(f"{path}: {len(distinct)} examples; a query shows {EXAMPLES}")
    return distinct


def _backgrounds(path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for number, line in _lines(path):
        name, _, background = (part.strip() for part in line.rpartition("\t"))
        if not background or "\t" in name:
            raise UsageError(f"{path}, line {number}: a background, or a class, a tab and a background are wanted")
        found.setdefault(name, {})[background] = None
    if not found:
        raise UsageError(f"{path}: empty; put one background a line")
    return {name: tuple(each) for name, each in found.items()}
