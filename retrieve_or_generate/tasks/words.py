"""The words of a task in files beside it: class names, templates, synonyms, WordNet ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.tasks.imagenet import distinct_names
from retrieve_or_generate.tasks.queries import read_text

CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


def lines_of(path: Path) -> tuple[str, ...]:
    """The lines of a file that hold something, without the space around it."""
    if not path.is_file():
        raise UsageError(f"{path}: missing; a task folder needs it, or a task.yaml (docs/tasks.md)")
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


def names_in(path: Path) -> tuple[str, ...]:
    """A name a line, where the number of the line says what it is: an empty one between two names would move all after it."""
    names = lines_of(path)
    for number, line in enumerate(read_text(path).rstrip().splitlines(), start=1):
        if not line.strip():
            raise UsageError(
                f"{path}: line {number} is empty, and class ids are numbers of lines; put a name there, or nothing"
            )
    return names


def class_names_in(path: Path) -> tuple[str, ...]:
    """A name a line, in the order of the class ids. ImageNet's list as CLIP published it has its two repeats told apart."""
    return checked_names(distinct_names(names_in(path)), str(path))


def checked_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """`UsageError` for fewer than two names, or one that stands there twice."""
    if len(names) < 2:
        raise UsageError(f"{where}: {len(names)} class; a task needs two or more")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError(f"{where}: {name!r} stands there twice; give each class a name of its own")
        seen.add(name)
    return tuple(names)


def templates_in(path: Path) -> tuple[str, ...]:
    """A template a line."""
    return checked_templates(lines_of(path), str(path))


def checked_templates(lines: Sequence[str], where: str) -> tuple[str, ...]:
    """What is said around a class name, which stands at `{}`; `{c}`, as CLIP_benchmark has it, is put so."""
    templates = tuple(line.replace("{c}", "{}") for line in lines)
    if not templates:
        raise UsageError(f"{where}: no template; put one a line, such as: a photo of a {{c}}.")
    nameless = [template for template in templates if "{}" not in template]
    if nameless:
        raise UsageError(f"{where}: {nameless[0][:80]!r} has no {{c}}, where the class name goes")
    return templates


def wnids_in(path: Path, class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes' synsets in WordNet 3.0, in their order; none where there is no file."""
    wnids = lines_of(path) if path.is_file() else ()
    if wnids and len(wnids) != len(class_names):
        raise UsageError(
            f"{path}: {len(wnids)} ids for {len(class_names)} classes; give each class a line, in their order"
        )
    for wnid in wnids:
        if not re.fullmatch(r"n\d{8}", wnid):
            raise UsageError(f"{path}: {wnid[:40]!r} is no WordNet id, such as n02012849")
    return wnids


def synonyms_in(path: Path) -> dict[str, tuple[str, ...]]:
    """Other names of classes, in file order; none where there is no file."""
    synonyms: dict[str, tuple[str, ...]] = {}
    for line in lines_of(path) if path.is_file() else ():
        known, _, word = (part.strip() for part in line.partition("\t"))
        if not word:
            raise UsageError(f"{path}: no synonym after {known!r}; a line is a class name, a tab and one synonym")
        synonyms[known] = (*synonyms.get(known, ()), word)
    return synonyms
