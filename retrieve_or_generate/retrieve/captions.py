"""Which captions speak of which class: every name looked for in one pass over the Arrow buffers.

Takes captions and names, gives pairs of row and label. Three semantics, because they disagree by a factor of six on web captions
and a study must say which it used: `substring` finds "ant" in "plant"; `word` wants no letter or digit beside the name; `token` is
SQLite's full-text match, which the released code of "The Unmet Promise" used: words in order, whatever stands between them,
accents aside. Letters are case-folded in all three.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ahocorasick_rs import BytesAhoCorasick

from retrieve_or_generate.errors import UsageError, unknown_name

Semantics = Literal["substring", "token", "word"]
MATCHES = pa.schema([("row", pa.int64()), ("label", pa.int64()), ("query", pa.string())])

_SLICE = 1 << 18  # captions searched at a time


def match_captions(
    captions: pa.ChunkedArray | pa.Array, names: Mapping[int, Sequence[str]], semantics: Semantics = "substring"
) -> pa.Table:
    """One row for every caption that has a name of a label, ordered by row and label; `query` is the first such name.

    `captions` are strings, null where there is none; `names` maps a label to what it is called. Raises `UsageError` for unknown
    semantics and for a name without a letter or digit.
    """
    if semantics not in get_args(Semantics):
        raise unknown_name("caption semantics", semantics, get_args(Semantics))
    listed = [(label, name) for label, all_names in names.items() for name in all_names]
    patterns = [_pattern(name, semantics) for _, name in listed]
    search = _Search(patterns)
    chunks = captions.chunks if isinstance(captions, pa.ChunkedArray) else [captions]
    found, first = [np.zeros((0, 2), np.int64)], 0
    for chunk in chunks:
        for start in range(0, len(chunk), _SLICE):
            part = chunk.slice(start, _SLICE)
            pairs = search.pairs(_prepared(part, semantics), whole_words=semantics == "word")
            found.append(pairs + np.array([first + start, 0]))
        first += len(chunk)
    return _table(np.concatenate(found), listed)


def _table(pairs: np.ndarray, listed: Sequence[tuple[int, str]]) -> pa.Table:
    """(n, 2) rows and places in `listed` to one row per row and label, the earliest listed name winning."""
    labels = np.array([label for label, _ in listed], np.int64)
    rows, places = pairs.T
    order = np.lexsort((places, labels[places], rows)) if len(listed) else np.zeros(0, np.int64)
    rows, places = rows[order], places[order]
    keys = np.stack([rows, labels[places]]) if len(listed) else np.zeros((2, 0), np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    queries = [listed[place][1] for place in places[new]]
    return pa.table({"row": keys[0, new], "label": keys[1, new], "query": queries}, MATCHES)


def _pattern(name: str, semantics: Semantics) -> bytes:
    folded = name.strip().casefold()
    if not any(character.isalnum() for character in folded):
        raise UsageError(f"class name {name!r} has no letter or digit, so no caption can be matched with it")
    return (f" {_tokens(folded)} " if semantics == "token" else folded).encode()


def _tokens(folded: str) -> str:
    """Runs of letters and digits, accents removed, one space between."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


def _prepared(captions: pa.Array, semantics: Semantics) -> pa.Array:
    """Case-folded captions; for `token` their words, each with a space before and after. ASCII stays in Arrow's kernels."""
    text = pc.fill_null(captions.cast(pa.large_string()), "")
    ascii_only = pc.string_is_ascii(text)
    folded = pc.ascii_lower(text)
    if semantics == "token":
        words = pc.replace_substring_regex(folded, pattern="[^a-z0-9]+", replacement=" ")
        space, nothing = (pa.scalar(value, pa.large_string()) for value in (" ", ""))
        folded = pc.binary_join_element_wise(space, pc.ascii_trim_whitespace(words), space, nothing)
    if pc.all(ascii_only).as_py():
        return folded
    other = pc.filter(text, pc.invert(ascii_only)).to_pylist()
    by_hand = [f" {_tokens(s.casefold())} " if semantics == "token" else s.casefold() for s in other]
    return pc.replace_with_mask(folded, pc.invert(ascii_only), pa.array(by_hand, pa.large_string()))


class _Search:
    """All patterns at once over one buffer. Equal patterns are looked for once and found for each of their places."""

    def __init__(self, patterns: Sequence[bytes]):
        self.places: dict[bytes, list[int]] = {}
        for place, pattern in enumerate(patterns):
            self.places.setdefault(pattern, []).append(place)
        self.engine = BytesAhoCorasick(list(self.places)) if self.places else None

    def pairs(self, captions: pa.Array, whole_words: bool) -> np.ndarray:
        """(n, 2) int64: caption number and place of the pattern in it."""
        if self.engine is None or not len(captions):
            return np.zeros((0, 2), np.int64)
        offsets = np.frombuffer(captions.buffers()[1], np.int64)[captions.offset : captions.offset + len(captions) + 1]
        text = np.frombuffer(captions.buffers()[2] or b"", np.uint8)
        inner = text[offsets[0] : offsets[-1]].data
        hits = np.array(self.engine.find_matches_as_indexes(inner, overlapping=True), np.int64).reshape(-1, 3)
        starts, stops = hits[:, 1] + offsets[0], hits[:, 2] + offsets[0]
        rows = np.searchsorted(offsets, starts, side="right") - 1
        inside = stops <= offsets[rows + 1]  # not across the border of two captions
        rows, starts, stops, patterns = rows[inside], starts[inside], stops[inside], hits[inside, 0]
        if whole_words:
            alone = _stand_alone(text, starts, stops, offsets[rows], offsets[rows + 1])
            rows, patterns = rows[alone], patterns[alone]
        return self._expand(rows, patterns)

    def _expand(self, rows: np.ndarray, patterns: np.ndarray) -> np.ndarray:
        flat = np.array([place for places in self.places.values() for place in places], np.int64)
        counts = np.array([len(places) for places in self.places.values()], np.int64)
        first = np.cumsum(counts) - counts
        repeats = counts[patterns]
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return np.stack([np.repeat(rows, repeats), flat[np.repeat(first[patterns], repeats) + within]], axis=1)


_NONE, _LETTER_OR_DIGIT, _BEYOND_ASCII = range(3)
_KIND = np.array([_BEYOND_ASCII if byte > 127 else int(chr(byte).isalnum()) for byte in range(256)], np.uint8)


def _stand_alone(
    text: np.ndarray, starts: np.ndarray, stops: np.ndarray, first: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Whether neither a letter nor a digit, of any script, stands beside each match; `first` and `end` limit its caption."""
    last = len(text) - 1
    before = np.where(starts == first, _NONE, _KIND[text[np.maximum(starts - 1, 0)]])
    after = np.where(stops == end, _NONE, _KIND[text[np.minimum(stops, last)]])
    alone = (before == _NONE) & (after == _NONE)
    for hit in np.flatnonzero((before == _BEYOND_ASCII) | (after == _BEYOND_ASCII)):
        left = text[max(first[hit], starts[hit] - 4) : starts[hit]].tobytes().decode(errors="ignore")[-1:]
        right = text[stops[hit] : min(end[hit], stops[hit] + 4)].tobytes().decode(errors="ignore")[:1]
        alone[hit] = not (left.isalnum() or right.isalnum())
    return alone
