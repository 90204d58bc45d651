"""Captions as one text to search, and what counts as having a term: the three semantics.

    substring   "ant" is in "plant". Letters are case-folded.
    word        as substring, with neither a letter nor a digit beside it: "ant-hill", not "plant".
    token       all words of the term, whole, anywhere and in any order: "falcon 2" is in "2 falcon feathers". That is the SQLite
                full-text match (FTS5, unicode61) which the released code of "The Unmet Promise" ran in place of a substring test:
                accents fold; a term with "-" or "/", or in double quotes, is a phrase, its words next to each other in order.

They disagree by a factor of six on web captions, so a study must say which it used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Semantics = Literal["substring", "token", "word"]

_SPACE = ord(" ")
_HIGH_BITS = np.uint64(0x8080808080808080)


@dataclass(frozen=True)
class Text:
    """Captions one after another: piece i is `data[offsets[i]:offsets[i + 1]]`, uint8; `offsets` (n + 1,) int64.

    `rows` (n,) int64 says which caption a piece is; -1 where the caption, not being ASCII, is to be found folded in another text.
    """

    data: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray


def as_texts(captions: pa.Array, semantics: Semantics, folding: np.ndarray) -> list[Text]:
    """Strings, null where there is none, as texts to find atoms in: one of all, one of those that have any of `folding`, folded.

    `folding` is what `to_fold` gives. ASCII letters keep their case: engines overlook it.
    """
    strings = _strings(captions)
    if semantics == "token":  # each with a space after it
        strings = pc.binary_join_element_wise(strings, *(pa.scalar(part, pa.large_string()) for part in ("", " ")))
    plain = _joined(strings)
    texts = [plain]
    if len(other := _having(plain, folding)):
        fold = _accent_folded if semantics == "token" else str.casefold
        folded = _joined(pa.array(map(fold, _decoded(plain, other)), pa.large_string()))
        plain.rows[other] = -1
        texts.append(Text(folded.data, folded.offsets, other))
    return [_tokens(text) for text in texts] if semantics == "token" else texts


def to_fold(looked_for: Iterable[bytes], semantics: Semantics) -> np.ndarray:
    """(65536,) bool: the first two UTF-8 bytes, as one number, of characters that must be folded for these atoms to be found.

    For `token` that is all beyond ASCII. Else those whose case-folding has a letter of the atoms, and those where it decides
    whether a letter or digit stands at an end; to fold more of them changes nothing.
    """
    if semantics == "token":
        return np.ones(1 << 16, bool)
    letters = set(b"".join(looked_for).decode()) | set(map(chr, range(128)))
    table = np.zeros(1 << 16, bool)
    for character, folded in _foldings():
        ends = {character.isalnum(), folded[0].isalnum(), folded[-1].isalnum()}
        if len(ends) == 2 or not letters.isdisjoint(folded):
            table[int.from_bytes(character.encode()[:2])] = True
    return table


@cache
def _foldings() -> tuple[tuple[str, str], ...]:
    """Characters beyond ASCII that case-folding changes, and into what."""
    two_planes = map(chr, range(128, 0x20000))  # no script beyond them has cases
    return tuple((character, folded) for character in two_planes if (folded := character.casefold()) != character)


def atoms(term: str, semantics: Semantics) -> tuple[bytes, ...]:
    """What must all be found in a caption that has the term."""
    inner = term.strip()
    quoted = len(inner) > 1 and inner[0] == inner[-1] == '"'
    inner = inner[1:-1].strip() if quoted else inner
    if semantics != "token":
        return (inner.casefold().encode(),)
    phrase = quoted or "-" in inner or "/" in inner
    units = (inner,) if phrase else inner.split()
    words = (" ".join(unit.translate(_FOLDED).split()) for unit in units)
    return tuple(dict.fromkeys(f" {word} ".encode() for word in words if word))


def accepted(text: Text, starts: np.ndarray, ends: np.ndarray, semantics: Semantics) -> tuple[np.ndarray, np.ndarray]:
    """Which occurrences of atoms count, (n,) bool, and the caption of each, (n,) int64. None crosses two captions."""
    if semantics == "token":  # the spaces at an atom's ends may belong to its neighbours
        starts, ends = starts + 1, ends - 1
    pieces = np.searchsorted(text.offsets, ends, side="left") - 1
    rows = text.rows[pieces]
    good = (starts >= text.offsets[pieces]) & (rows >= 0)
    if semantics == "word":
        good[good] = _stand_alone(text, pieces[good], starts[good], ends[good])
    return good, rows


def _strings(captions: pa.Array) -> pa.Array:
    """Any string-like array as large strings without nulls; bytes that are not UTF-8 stay as they are until they are folded."""
    if pa.types.is_binary(captions.type):
        captions = captions.cast(pa.large_binary())
    plain = (
        captions.view(pa.large_string())
        if pa.types.is_large_binary(captions.type)
        else captions.cast(pa.large_string())
    )
    return pc.fill_null(plain, "") if plain.null_count else plain


def _joined(strings: pa.Array) -> Text:
    """The text that Arrow holds already."""
    offsets = np.frombuffer(strings.buffers()[1], np.int64)[strings.offset : strings.offset + len(strings) + 1]
    data = np.frombuffer(strings.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return Text(data, offsets - offsets[0], np.arange(len(strings)))


def _having(text: Text, pairs: np.ndarray) -> np.ndarray:
    """Captions, ascending, with two bytes after each other that `pairs` has, the first above 127."""
    whole = len(text.data) // 8 * 8  # eight bytes are looked at together: most text has nothing there
    words = np.flatnonzero((text.data[:whole].view(np.uint64) & _HIGH_BITS) != 0)
    near = np.concatenate([(8 * words[:, None] + np.arange(8)).ravel(), np.arange(whole, len(text.data))])
    places = near[text.data[near] > 127]
    following = text.data[np.minimum(places + 1, len(text.data) - 1)]
    places = places[pairs[text.data[places] * np.uint16(256) + following]]
    return np.unique(np.searchsorted(text.offsets, places, side="right") - 1)


def _decoded(text: Text, rows: np.ndarray) -> list[str]:
    """Captions as strings; bytes that are not UTF-8 become U+FFFD."""
    data = text.data.data
    spans = zip(text.offsets[rows].tolist(), text.offsets[rows + 1].tolist(), strict=True)
    return [str(data[start:end], "utf-8", "replace") for start, end in spans]


def _tokens(text: Text) -> Text:
    """Runs of letters and digits, one space between and one before and after every caption, of captions that end with a space."""
    spaced = np.frombuffer(b" " + text.data.tobytes().translate(_SEPARATED), np.uint8)
    space = spaced == _SPACE
    kept = ~(space[1:] & space[:-1])
    offsets = np.ones_like(text.offsets)
    if len(text.rows):
        offsets[1:] += np.cumsum(np.add.reduceat(kept, text.offsets[:-1], dtype=np.int64))
    return Text(spaced[np.concatenate([[True], kept])], offsets, text.rows)


def _accent_folded(text: str) -> str:
    """What is beyond ASCII folded; a character at a time is slow, so the rest is left alone."""
    return _BEYOND.sub(lambda run: run[0].translate(_FOLDED), text)


class _Folding(dict[int, str]):
    """A `str.translate` table to what FTS5's unicode61 makes of a character; it knows characters up to Unicode 6.1.

    A letter or digit to its lower case, without its accent where the letter below is Latin and plain ("é" but not "ế"); an accent
    of its own to nothing; anything else to a space.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Mn" and 0x300 <= code <= 0x331:
            self[code] = ""
        elif character.isalnum() or category == "Co":
            self[code] = _lower(_without_accent(character))
        else:
            self[code] = " "
        return self[code]


def _without_accent(character: str) -> str:
    base, _, rest = unicodedata.decomposition(character).partition(" ")
    plain_latin = rest and not base.startswith("<") and int(base, 16) < 0x80
    return chr(int(base, 16)) if plain_latin else character


def _lower(character: str) -> str:
    folded = character.casefold()
    return folded if len(folded) == 1 else character.lower()


_FOLDED = _Folding()
_BEYOND = re.compile(r"[^\x00-\x7f]+")
_SEPARATED = bytes(byte if byte > 127 or chr(byte).isalnum() else _SPACE for byte in range(256))

_NONE, _LETTER_OR_DIGIT, _BEYOND_ASCII = range(3)
_KIND = np.array([_BEYOND_ASCII if byte > 127 else int(chr(byte).isalnum()) for byte in range(256)], np.uint8)


def _stand_alone(text: Text, pieces: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) bool: neither a letter nor a digit, of any script, stands beside the occurrence in its caption."""
    first, last = text.offsets[pieces], text.offsets[pieces + 1]
    before = np.where(starts == first, _NONE, _KIND[text.data[np.maximum(starts - 1, 0)]])
    after = np.where(ends == last, _NONE, _KIND[text.data[np.minimum(ends, len(text.data) - 1)]])
    alone = (before == _NONE) & (after == _NONE)
    for hit in np.flatnonzero((before == _BEYOND_ASCII) | (after == _BEYOND_ASCII)):
        left = text.data[max(first[hit], starts[hit] - 4) : starts[hit]].tobytes().decode(errors="ignore")[-1:]
        right = text.data[ends[hit] : min(last[hit], ends[hit] + 4)].tobytes().decode(errors="ignore")[:1]
        alone[hit] = not (left.isalnum() or right.isalnum())
    return alone
