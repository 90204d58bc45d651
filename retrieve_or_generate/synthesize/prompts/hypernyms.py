"""What each class is a kind of: from files of the user's, from WordNet, or of the pocket world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pocket.captions import HYPERNYMS
from retrieve_or_generate.synthesize.prompts.text import named, read_by_class
from retrieve_or_generate.synthesize.prompts.wordnet import Resolved, WordNet
from retrieve_or_generate.tasks import Task

_Finder = Callable[[int], Resolved | None]


def resolve(task: Task, sources: tuple[str, ...] | None, unneeded: tuple[str, ...] = ()) -> list[Resolved | None]:
    """A hypernym for each class, from the first source that has one: a TSV, or a folder of WordNet 3.0; None: the pocket world's.

    Raises `UsageError` naming a class that no source knows, unless it is one of `unneeded`.
    """
    finders = [_pocket(task)] if sources is None else [_finder(task, Path(source)) for source in sources]
    found = [
        next((hypernym for find in finders if (hypernym := find(label))), None)
        for label in range(len(task.class_names))
    ]
    unknown = [
        name for name, hypernym in zip(task.class_names, found, strict=True) if not hypernym and name not in unneeded
    ]
    if unknown:
        where = f"{', '.join(sources)}: no" if sources else "no"
        raise UsageError(
            f"{where} hypernym for class {named(unknown)}; give synthesize.prompts.hypernyms a file of class name, tab, hypernym "
            "(it may be a list of such files and of folders with WordNet 3.0's data.noun)"
        )
    return found


def _pocket(task: Task) -> _Finder:
    def find(label: int) -> Resolved | None:
        word = HYPERNYMS.get(task.class_names[label])
        return Resolved(word, {"from": "pocket"}) if word else None

    return find


def _finder(task: Task, path: Path) -> _Finder:
    if path.is_dir():
        wordnet = WordNet(path)
        if task.wnids:
            return lambda label: wordnet.by_wnid(task.wnids[label])
        return lambda label: wordnet.by_name(task.class_names[label])
    texts = read_by_class(path, task.class_names, "hypernym")
    for name, own in texts.items():
        if len(own) > 1:
            first, second = list(own)[:2]
            raise UsageError(f"{path}, line {second}: {name!r} has a hypernym in line {first} already")

    def find(label: int) -> Resolved | None:
        own = texts[task.class_names[label]]
        return Resolved(next(iter(own.values())), {"from": path.name}) if own else None

    return find
