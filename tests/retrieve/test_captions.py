"""Caption matching against plain Python, and `token` against SQLite's full-text search."""

from __future__ import annotations

import re
import sqlite3

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.retrieve.captions import match_captions

CAPTIONS = [
    "A plant, ant-hill",
    "ANT!",
    None,
    "giant",
    "the ant_eater",
    "curly “ant” quotes",
    "falcon-2 over the sea",
    "Falcon 2",
    "",
    "fàlcon 2",
    "Straße",
    "STRASSE",
    "鳥ant",
    "ant",
]


def pairs(table: pa.Table) -> list[tuple[int, int, str]]:
    return list(zip(*(table[name].to_pylist() for name in ("row", "label", "query")), strict=True))


def test_the_three_semantics_differ_where_they_say() -> None:
    names = {0: ["ant"], 1: ["falcon 2"], 2: ["strasse"]}
    rows = {
        s: [(row, label) for row, label, _ in pairs(match_captions(pa.array(CAPTIONS), names, s))]
        for s in ("substring", "word", "token")
    }
    common = [(1, 0), (4, 0), (5, 0), (7, 1), (10, 2), (11, 2), (13, 0)]
    assert rows["word"] == sorted([*common, (0, 0)])
    assert rows["token"] == sorted([*common, (0, 0), (6, 1), (9, 1)])
    assert rows["substring"] == sorted([*common, (0, 0), (3, 0), (12, 0)])


def test_one_row_for_a_row_and_label_and_the_first_listed_name_wins() -> None:
    found = match_captions(
        pa.array(["swirly whirlpool, whirlpool"]), {3: ["spiral", "whirlpool", "swirly"], 5: ["swirly"]}
    )
    assert pairs(found) == [(0, 3, "whirlpool"), (0, 5, "swirly")]


def test_rows_count_on_over_chunks_and_slices() -> None:
    chunked = pa.chunked_array(
        [
            pa.array(["x", "an ant", "y"]).slice(1),
            pa.array(["ant", None], pa.large_string())[:0].cast(pa.string()),
            pa.array(["ant"]),
        ]
    )
    assert pairs(match_captions(chunked, {0: ["ant"]})) == [(0, 0, "ant"), (2, 0, "ant")]


def test_nothing_to_find() -> None:
    assert match_captions(pa.array([], pa.string()), {0: ["ant"]}).num_rows == 0
    assert match_captions(pa.nulls(3, pa.string()), {0: ["ant"]}).num_rows == 0
    assert match_captions(pa.array(["ant"]), {}).num_rows == 0


def test_a_match_never_crosses_two_captions() -> None:
    assert match_captions(pa.array(["an", "t", "a", "nt"]), {0: ["ant"]}).num_rows == 0


def test_unusable_names_and_semantics() -> None:
    with pytest.raises(UsageError, match="no letter or digit"):
        match_captions(pa.array(["x"]), {0: [" - "]})
    with pytest.raises(UsageError, match="did you mean 'substring'"):
        match_captions(pa.array(["x"]), {0: ["x"]}, "substrings")  # type: ignore[arg-type]


LETTERS = st.text(st.sampled_from("aAbß é-_“1 "), max_size=12)
NAMES = LETTERS.map(str.strip).filter(lambda s: any(c.isalnum() for c in s))


def expected(caption: str | None, name: str, semantics: str) -> bool:
    text, wanted = (caption or "").casefold(), name.casefold()
    if semantics == "substring":
        return wanted in text
    return re.search(rf"(?<![^\W_]){re.escape(wanted)}(?![^\W_])", text) is not None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.none() | LETTERS, max_size=8),
    st.lists(st.lists(NAMES, max_size=3), max_size=3),
    st.sampled_from(["substring", "word"]),
)
def test_law_same_pairs_as_plain_python(captions: list[str | None], names: list[list[str]], semantics: str) -> None:
    found = match_captions(pa.array(captions, pa.string()), dict(enumerate(names)), semantics)  # type: ignore[arg-type]
    wanted = {
        (row, label): next(name for name in listed if expected(caption, name, semantics))
        for row, caption in enumerate(captions)
        for label, listed in enumerate(names)
        if any(expected(caption, name, semantics) for name in listed)
    }
    assert {(row, label): query for row, label, query in pairs(found)} == wanted
    assert pairs(found) == sorted(pairs(found), key=lambda p: p[:2])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("aAbéÉ-_“1 ,"), max_size=12), max_size=6),
    st.text(st.sampled_from("aébB1 -"), min_size=1, max_size=5),
)
def test_token_is_a_phrase_of_sqlite_full_text_search(captions: list[str], name: str) -> None:
    if not any(c.isalnum() for c in name):
        return
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE t USING fts5(caption)")
    database.executemany("INSERT INTO t(rowid, caption) VALUES (?, ?)", list(enumerate(captions)))
    rows = database.execute("SELECT rowid FROM t WHERE t MATCH ? ORDER BY rowid", (f'"{name}"',)).fetchall()
    database.close()
    assert [
        (row,) for row, _, _ in pairs(match_captions(pa.array(captions, pa.string()), {0: [name]}, "token"))
    ] == rows
