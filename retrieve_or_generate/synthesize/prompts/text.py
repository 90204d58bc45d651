"""Text from outside: files of the user's, and words that strangers put on the web."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.tasks.queries import read_text

_UNSEEN = ("Cc", "Cf", "Cs")
"""Control characters, format characters such as those that turn the direction of writing, halves of surrogate pairs."""


def clean(text: str) -> str:
    """One line without what cannot be seen: control and format characters go, every run of white space is one space."""
    line = " ".join(text.split())
    if line.isprintable():  # as most captions are, and there are millions
        return line
    return " ".join("".join(letter for letter in line if unicodedata.category(letter) not in _UNSEEN).split())


def numbered_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Each line that is neither blank nor a comment (`#`), and its number. `what` the file should be is for messages."""
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; it should be {what}") from error
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror}); it should be {what}") from error
    for number, line in enumerate(text.split("\n"), 1):  # not at form feeds and the like, which end no line
        if line.strip() and not line.startswith("#"):
            yield number, line


def read_by_class(path: Path, class_names: Sequence[str], column: str) -> dict[str, dict[int, str]]:
    """`class name, tab, TEXT` a line: of each class, by the number of the line, its cleaned texts; of some classes none.

    Raises `UsageError` with the line that has no tab, no text, or a class that is not of the task. `column` says what TEXT is.
    """
    texts: dict[str, dict[int, str]] = {name: {} for name in class_names}
    for number, line in numbered_lines(path, f"lines of class name, tab, {column}"):
        name, tab, text = line.partition("\t")
        name, text, where = name.strip(), clean(text), f"{path}, line {number}"
        if not tab:
            raise UsageError(f"{where}: no tab; a line is a class name, a tab and one {column}")
        if name not in texts:
            raise UsageError(f"{where}: {unknown_name('class', name, class_names)}")
        if not text:
            raise UsageError(f"{where}: no {column} after {name!r}")
        texts[name][number] = text
    return texts


def named(names: Sequence[str]) -> str:
    """The first of some names and how many more there are, for a message of one line."""
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
