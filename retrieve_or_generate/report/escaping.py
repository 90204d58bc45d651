"""Text from outside (captions, class names, task names) made safe to show: no control codes, no formulas.

HTML is escaped by jinja2; this is what must happen before, and for the places that are not HTML.
"""

from __future__ import annotations

import re

from retrieve_or_generate.errors import visible

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "'")


def shortened(text: str, most: int) -> str:
    """`visible` text of at most `most` characters, an ellipsis in place of the rest."""
    text = visible(text)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def csv_cell(value: object) -> object:
    """A text cell that no spreadsheet takes for a formula (CWE-1236): `'` before what starts like one, or starts with `'`.

    Reading back: drop one leading `'`. Numbers stay numbers.
    """
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


def file_stem(name: str, taken: set[str]) -> str:
    """A file name of letters, digits and dashes for `name`, unlike all in `taken` (to which it is added)."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40] or "task"
    free, number = stem, 2
    while free in taken:
        free, number = f"{stem}-{number}", number + 1
    taken.add(free)
    return free
