"""Caption matching against plain Python, `token` against SQLite's full-text search, and one engine against the other."""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.retrieve import captions as captions_module
from retrieve_or_generate.retrieve.caption_engines import AhoCorasick, Hyperscan, fastest_engine
from retrieve_or_generate.retrieve.captions import match_captions, match_pool
from retrieve_or_generate.tasks.queries import CaptionQuery

HYPERSCAN = importlib.util.find_spec("hyperscan") is not None
ENGINES = [
    "aho_corasick",
    pytest.param("hyperscan", marks=pytest.mark.skipif(not HYPERSCAN, reason="hyperscan is not installed")),
]

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
    common = [(0, 0), (1, 0), (4, 0), (5, 0), (7, 1), (11, 2), (13, 0)]
    assert rows["word"] == sorted([*common, (10, 2)])
    assert rows["token"] == sorted([*common, (6, 1), (9, 1)])
    assert rows["substring"] == sorted([*common, (3, 0), (10, 2), (12, 0)])


TOKENS = [
    "2 falcon feathers",
    "falcon-2",
    "falcon 20",
    "Red, black-eyed susan",
    "susan's black eyed pea",
    "eyed susan, black",
]


def test_token_wants_all_words_in_any_order_and_keeps_phrases_together() -> None:
    names = {
        0: ["falcon 2"],
        1: ["falcon-2"],
        2: ["susan black"],
        3: ["black-eyed susan"],
        4: ['"eyed susan"'],
        5: ["susan's"],
    }
    found = pairs(match_captions(pa.array(TOKENS), names, "token"))
    assert [(row, label) for row, label, _ in found] == [
        (0, 0), (1, 0), (1, 1), (3, 2), (3, 3), (3, 4), (4, 2), (4, 5), (5, 2), (5, 4),
    ]  # fmt: skip


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
    assert match_captions(pa.array(["", "", None]), {0: ["ant"]}, "word").num_rows == 0
    assert match_captions(pa.array(["", "-"]), {0: ["ant"]}, "token").num_rows == 0


def test_a_quote_that_does_not_go_around_a_name_is_part_of_it() -> None:
    captions = pa.array(['the ruler 6" of steel', "the ruler 6 of steel"])
    assert pairs(match_captions(captions, {0: ['ruler 6"'], 1: ['"ruler 6"']})) == [
        (0, 0, 'ruler 6"'),
        (0, 1, '"ruler 6"'),
        (1, 1, '"ruler 6"'),
    ]


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


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=80, deadline=None)
@given(
    captions=st.lists(st.none() | LETTERS, max_size=8),
    names=st.lists(st.lists(NAMES, max_size=3), max_size=3),
    semantics=st.sampled_from(["substring", "word"]),
)
def test_law_same_pairs_as_plain_python(
    captions: list[str | None], names: list[list[str]], semantics: Any, engine: Any
) -> None:
    found = match_captions(pa.array(captions, pa.string()), dict(enumerate(names)), semantics, engine)
    wanted = {
        (row, label): next(name for name in listed if expected(caption, name, semantics))
        for row, caption in enumerate(captions)
        for label, listed in enumerate(names)
        if any(expected(caption, name, semantics) for name in listed)
    }
    assert {(row, label): query for row, label, query in pairs(found)} == wanted
    assert pairs(found) == sorted(pairs(found), key=lambda p: p[:2])


TERMS = (
    st.text(st.sampled_from("aAbé-1 "), min_size=1, max_size=5)
    .filter(lambda s: any(c.isalnum() for c in s))
    .map(str.strip)
)
QUERIES = st.lists(st.lists(st.lists(TERMS, min_size=1, max_size=2), min_size=1, max_size=3), max_size=3).map(
    lambda lines: CaptionQuery(tuple(tuple(tuple(column) for column in line) for line in lines))
)


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower().replace("é", "e")).split()


def has(caption: str, term: str, semantics: str) -> bool:
    if semantics != "token":
        return expected(caption, term, semantics)
    units = [words(term)] if "-" in term else [words(unit) for unit in term.split()]
    said = words(caption)
    return all(
        any(said[start : start + len(unit)] == unit for start in range(len(said))) if unit else True for unit in units
    )


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=100, deadline=None)
@given(
    captions=st.lists(st.text(st.sampled_from("aAbéÉ-“1 "), max_size=14), max_size=6),
    queries=st.lists(QUERIES, max_size=3),
    semantics=st.sampled_from(["substring", "word", "token"]),
)
def test_law_a_query_is_met_by_a_line_of_which_every_column_has_a_term(
    captions: list[str], queries: list[CaptionQuery], semantics: Any, engine: Any
) -> None:
    found = match_captions(pa.array(captions, pa.string()), dict(enumerate(queries)), semantics, engine)
    wanted = [
        (row, label, " + ".join(next(term for term in column if has(caption, term, semantics)) for column in met[0]))
        for row, caption in enumerate(captions)
        for label, query in enumerate(queries)
        if (met := [
            line
            for line in query.lines
            if all(any(has(caption, term, semantics) for term in column) for column in line)
        ])
    ]  # fmt: skip
    assert pairs(found) == wanted


CHARACTERS = st.sampled_from("aAbzß 1-_,.’“”éÉèñøåĄİıſΐάΣςЙйЁ鳥あ٣ế½²ºªµ\u0301\u200b\n\0") | st.characters(
    max_codepoint=0x24F
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(CHARACTERS, max_size=14), max_size=6), st.text(CHARACTERS, min_size=1, max_size=6))
def test_law_token_is_the_full_text_match_of_sqlite(captions: list[str], name: str) -> None:
    name = name.replace("\0", "").replace('"', "").strip()
    if not any(c.isalnum() for c in name):
        return
    captions = [caption.replace("\0", " ") for caption in captions]  # where SQLite ends a string
    units = [name] if "-" in name or "/" in name else [u for u in name.split() if any(c.isalnum() for c in u)]
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE t USING fts5(caption)")
    database.executemany("INSERT INTO t(rowid, caption) VALUES (?, ?)", list(enumerate(captions)))
    asked = " AND ".join(f'"{unit}"' for unit in units)
    rows = database.execute("SELECT rowid FROM t WHERE t MATCH ? ORDER BY rowid", (asked,)).fetchall()
    database.close()
    found = match_captions(pa.array(captions, pa.string()), {0: [name]}, "token")
    assert found["row"].to_pylist() == [row for (row,) in rows]


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=60),
    st.lists(
        st.text(st.sampled_from("aAbé 1"), min_size=1, max_size=4).map(str.encode), min_size=1, unique_by=bytes.lower
    ),
)
@pytest.mark.skipif(not HYPERSCAN, reason="hyperscan is not installed")
def test_law_both_engines_find_the_same(text: bytes, patterns: list[bytes]) -> None:
    found = [
        sorted(zip(*map(np.ndarray.tolist, make(patterns).find(np.frombuffer(text, np.uint8))), strict=True))
        for make in (AhoCorasick, Hyperscan)
    ]
    naive = [
        (start + len(pattern), number)
        for number, pattern in enumerate(patterns)
        for start in range(len(text))
        if text[start : start + len(pattern)].lower() == pattern.lower()
    ]
    assert found == [sorted(naive)] * 2


def test_every_character_that_folds_to_a_letter_of_a_name_is_found() -> None:
    folding = [chr(code) for code in range(128, 0x20000) if chr(code) != chr(code).casefold()]
    to_ascii = [character for character in folding if any(letter.isascii() for letter in character.casefold())]
    for character in [*folding[::40], *to_ascii]:
        found = match_captions(pa.array(["x" + character + "y", "x", "antẞ"]), {0: ["x" + character.casefold()]})
        assert found["row"].to_pylist() == [0], character
    kelvin = match_captions(
        pa.array(["10 \u212a", "ﬁre", "caſe", "İ"]), {0: ["k"], 1: ["fire"], 2: ["case"], 3: ["i"]}, "word"
    )
    assert [(row, label) for row, label, _ in pairs(kelvin)] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_pattern_that_hyperscan_does_not_take_is_found_all_the_same() -> None:
    name = "".join(map(str, range(6000)))
    assert isinstance(fastest_engine([name.encode()]), AhoCorasick)
    assert match_captions(pa.array(["y", name[1:], "." + name]), {0: [name]}).num_rows == 1


def test_without_hyperscan_the_other_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hyperscan", None)
    assert isinstance(fastest_engine([b"ant"]), AhoCorasick)
    with pytest.raises(ImportError):
        fastest_engine([b"ant"], "hyperscan")


@pytest.mark.parametrize("semantics", ["substring", "word", "token"])
def test_any_string_like_column_will_do_and_broken_bytes_are_no_match(semantics: Any) -> None:
    texts = ["Ant", None, "été"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        assert pairs(match_captions(pa.array(texts, kind), {0: ["ant", "été"]}, semantics)) == [
            (0, 0, "ant"),
            (2, 0, "été"),
        ]
    broken = pa.array([b"\xff an\xfft", b"\xc3 ant \xc3", None], pa.binary())
    assert pairs(match_captions(broken, {0: ["ant"]}, semantics)) == [(1, 0, "ant")]


CAPTIONED = [f"{'an ant' if row % 3 == 0 else 'plant'} nº {row}" if row % 7 else None for row in range(40)]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    folder = tmp_path / "pool"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, (start, stop) in enumerate([(0, 12), (12, 13), (13, 40)]):
        vectors = np.eye(4, dtype=np.float16)[np.arange(start, stop) % 4]
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", vectors)
        pq.write_table(pa.table({"TEXT": CAPTIONED[start:stop]}), folder / f"metadata/metadata_{number:04d}.parquet")
    return open_pool(str(folder))


@pytest.mark.parametrize("semantics", ["substring", "word", "token"])
def test_a_pool_gives_what_its_captions_give(pool: Pool, semantics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queries: dict[int, Any] = {0: ["ant"], 2: ["plant", "an ant"], 5: CaptionQuery(((("plant", "ant"), ("1", "2")),))}
    whole = match_captions(pa.array(CAPTIONED), queries, semantics)
    monkeypatch.setattr(captions_module, "_SLICE", 5)
    told: list[tuple[int, int]] = []
    assert match_pool(pool, queries, semantics, lambda *at: told.append(at)).equals(whole)
    assert whole.num_rows > 20
    assert told[-1] == (40, 40)
    assert len(told) == 3


def test_finished_shards_are_kept_and_only_whole_ones_are_trusted(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    wanted = match_captions(pa.array(CAPTIONED), {0: ["ant"]})
    searched: list[int] = []
    table = captions_module.Matcher.table

    def counted(self: Any, slices: Any) -> pa.Table:
        searched.append(1)
        if len(searched) == 3:
            raise KeyboardInterrupt
        return table(self, slices)

    monkeypatch.setattr(captions_module.Matcher, "table", counted)
    with pytest.raises(KeyboardInterrupt):
        match_pool(pool, {0: ["ant"]}, state=state)
    assert match_pool(pool, {0: ["ant"]}, state=state).equals(wanted)
    assert len(searched) == 4, "two shards were finished, one was begun"
    assert sorted(path.suffix for path in state.iterdir()) == [".arrow"] * 3 + [".json"] * 3
    (state / "captions-00001.arrow").write_bytes(b"damaged")
    assert match_pool(pool, {0: ["ant"]}, state=state).equals(wanted)
    assert len(searched) == 5, "only the damaged shard is searched again"
    assert not match_pool(pool, {0: ["plant"]}, state=state).equals(wanted)
    assert len(searched) == 8, "another query finds nothing of its own there"


@pytest.mark.slow
def test_workers_give_what_one_process_gives(pool: Pool, tmp_path: Path) -> None:
    alone = match_pool(pool, {0: ["ant"]}, "token")
    assert match_pool(pool, {0: ["ant"]}, "token", jobs=2).equals(alone)
    assert match_pool(pool, {0: ["ant"]}, "token", jobs=2, state=tmp_path / "state").equals(alone)


def test_metadata_without_captions_or_cut_short_is_told(pool: Pool) -> None:
    path = pool.shards[2].metadata
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 200) + whole[-100:])
    with pytest.raises(
        IntegrityError, match=r"metadata_0002.parquet: its captions cannot be read|metadata_0002.parquet: \d+ captions"
    ):
        match_pool(pool, {0: ["ant"]})
    pq.write_table(pa.table({"caption": [["an ant"]] * 27}), path)
    with pytest.raises(IntegrityError, match=r"metadata_0002.parquet: its captions cannot be read \(Unsupported cast"):
        match_pool(pool, {0: ["ant"]})
    pq.write_table(pa.table({"url": ["x"] * 27}), path)
    with pytest.raises(UsageError, match=r"metadata_0002.parquet: no caption column"):
        match_pool(pool, {0: ["ant"]})
    pq.write_table(pa.table({"caption": ["ant"] * 26}), path)
    with pytest.raises(IntegrityError, match=r"metadata_0002.parquet: 26 captions, but 27 rows"):
        match_pool(pool, {0: ["ant"]})


def test_mutated_metadata_gives_pairs_or_one_error_that_names_the_file(pool: Pool) -> None:
    shard, rng = pool.shards[2], np.random.default_rng(2406)
    whole = np.frombuffer(shard.metadata.read_bytes(), np.uint8)
    told: list[str] = []
    for _ in range(300):
        mutated = whole.copy()
        places = rng.integers(0, len(whole), rng.integers(1, 9))
        mutated[places] = rng.integers(0, 256, len(places))
        shard.metadata.write_bytes(mutated.tobytes()[: len(whole) if rng.random() < 0.8 else rng.integers(len(whole))])
        try:
            match_pool(pool, {0: ["ant"]}, "token")
        except (IntegrityError, UsageError) as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(message.startswith(str(shard.metadata)) for message in told)
