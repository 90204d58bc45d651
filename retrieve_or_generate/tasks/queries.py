"""What a caption must say to be of a class: the class name, or what the task's `queries.tsv` puts in its place.

`queries.tsv` lies beside `classnames.txt`. A line is a class name and one or more columns, with tabs between:

    # every column must be met, by any one of its terms
    rose	{}	flower
    colt's foot	colt's foot | coltsfoot
    *	"{} texture" | "{} pattern" | "{} thing" | "{} object"

`|` stands between the terms of a column. Several lines of one class are alternatives: one of them is enough. `*` is every class
without a line of its own. In a term `{}` is the class name and `{synonym}` each of its synonyms in `synonyms.tsv` (none of them is
looked for unless it is asked for here); `{words}`, alone in its column, is a column for every word of the name. What it takes for a
caption to have a term is a matter of the semantics (`retrieve.captions`); double quotes make a term a phrase where its words could
else stand anywhere. Lines that begin with `#` are comments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrieve_or_generate.errors import UsageError, unknown_name

Column = tuple[str, ...]

ANY_CLASS = "*"
_MOST_ALTERNATIVES = 10_000


@dataclass(frozen=True)
class CaptionQuery:
    """A caption is of the class when, in any of `lines`, each column has a term that the caption has."""

    lines: tuple[tuple[Column, ...], ...]

    @classmethod
    def any_of(cls, names: Sequence[str]) -> CaptionQuery:
        """Any of these names is enough."""
        return cls(tuple(((name,),) for name in names))

    def alternatives(self) -> list[tuple[str, ...]]:
        """Sets of terms of which any one is enough, in the order in which they are listed."""
        return [terms for line in self.lines for terms in itertools.product(*line)]


def read_queries(
    path: Path, class_names: Sequence[str], synonyms: Mapping[str, Sequence[str]]
) -> dict[str, CaptionQuery]:
    """The query of every class that has a line in `path`, its own or `*`; a `UsageError` names the line that is not understood."""
    own: dict[str, list[tuple[Column, ...]]] = {name: [] for name in class_names}
    common: dict[str, list[tuple[Column, ...]]] = {name: [] for name in class_names}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        where = f"{path}, line {number}"
        name, *columns = (part.strip() for part in text.split("\t"))
        if name != ANY_CLASS and name not in own:
            raise UsageError(f"{where}: {unknown_name('class', name, class_names)}")
        if not any(columns):
            raise UsageError(f"{where}: nothing to look for; put a tab and what captions must say after {name!r}")
        for each in class_names if name == ANY_CLASS else (name,):
            parts = (_columns(column, each, synonyms.get(each, ()), where) for column in columns)
            (common if name == ANY_CLASS else own)[each].append(tuple(itertools.chain(*parts)))
    lines = {name: own[name] or common[name] for name in class_names}
    queries = {name: CaptionQuery(tuple(mine)) for name, mine in lines.items() if mine}
    for name, query in queries.items():
        count = sum(math.prod(map(len, line)) for line in query.lines)
        if count > _MOST_ALTERNATIVES:
            raise UsageError(
                f"{path}: {name!r} has {count} alternatives, {_MOST_ALTERNATIVES} are the most; list fewer terms"
            )
    return queries


def read_text(path: Path) -> str:
    """A file of a task; `UsageError` where it is not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _columns(text: str, name: str, synonyms: Sequence[str], where: str) -> list[Column]:
    """The columns that one column of the file stands for, with the class name and its synonyms put in."""
    if text == "{words}":
        return [(word,) for word in name.split() if _has_word(word)]
    terms: list[str] = []
    for term in (part.strip() for part in text.split("|")):
        if term.count('"') not in (0, 2) or ('"' in term and not (term[0] == term[-1] == '"')):
            raise UsageError(f"{where}: double quotes go around a whole term, not {term!r}")
        for synonym in synonyms if "{synonym}" in term else ("",):
            terms.append(term.replace("{synonym}", synonym).replace("{}", name))
    for term in terms:
        if not _has_word(term):
            raise UsageError(f"{where}: term {term!r} has no letter or digit")
    if not terms:
        raise UsageError(f"{where}: {name!r} has no synonym in synonyms.tsv, so the column {text!r} is empty")
    return [tuple(dict.fromkeys(terms))]


def _has_word(term: str) -> bool:
    return any(character.isalnum() for character in term)
