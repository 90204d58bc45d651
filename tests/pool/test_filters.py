"""Rows that may be found: every reason by hand, lists of every kind, and the law that left out and kept rows are all rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool import row_lists
from retrieve_or_generate.pool.filters import RowFilter
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.row_lists import RowList
from retrieve_or_generate.settings import RowSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pool_of(folder: Path, *shards: dict[str, list[object]]) -> Pool:
    """A pool whose shards have these columns."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, columns in enumerate(shards):
        rows = len(next(iter(columns.values())))
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", np.tile(np.float16([1, 0]), (rows, 1)))
        pq.write_table(pa.table(columns), folder / f"metadata/metadata_{number:04d}.parquet")
    return open_pool(str(folder))


def kept(rows: RowFilter, pool: Pool) -> list[bool]:
    """The mask of all shards."""
    masks = [rows.mask(shard) for shard in pool.shards]
    return [bool(one) for mask in masks if mask is not None for one in mask]


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


URLS = [f"https://x.org/{n}.jpg" for n in range(6)]
SHARD = {
    "URL": URLS,
    "TEXT": [f"caption {n}" for n in range(6)],
    "md5": [md5(url) for url in URLS],
    "hash": [mmh3.hash64(f"{url}caption {n}".encode())[0] for n, url in enumerate(URLS)],
    "punsafe": [0.1, 0.9, None, 0.2, 0.5, 0.0],
    "similarity": [0.3, 0.4, 0.4, 0.2, 0.31, 0.5],
    "WIDTH": [300, 300, 300, 300, 300, 200],
    "HEIGHT": [256, 256, 256, 256, 256, 900],
}


def test_without_settings_every_row_may_be_found(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", SHARD)
    rows = RowFilter(pool, RowSettings())
    assert rows.mask(pool.shards[0]) is None
    assert rows.counts == {}


def test_each_row_left_out_has_the_first_reason_that_holds(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", SHARD)
    rows = RowFilter(pool, RowSettings(punsafe_below=0.5, similarity_from=0.3, least_side=256))
    assert kept(rows, pool) == [True, False, False, False, False, False]
    assert rows.counts == {"unknown": 1, "unsafe": 2, "dissimilar": 1, "small": 1}
    kept(rows, pool)
    assert rows.counts == {"unknown": 1, "unsafe": 2, "dissimilar": 1, "small": 1}  # a shard counts once


def test_a_filter_that_leaves_no_row_is_told_with_its_counts(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", SHARD, SHARD)
    rows = RowFilter(pool, RowSettings(punsafe_below=0.01, similarity_from=0.6))
    rows.mask(pool.shards[0])
    rows.check_left()  # there is another shard
    rows.mask(pool.shards[1])
    with pytest.raises(
        UsageError, match=r"pool: retrieve.rows leaves out all of its 12 rows \(2 dissimilar, 2 unknown, 8 unsafe\)"
    ):
        rows.check_left()


def listed(path: Path, *lines: object) -> str:
    path.write_text("# a list\n\n" + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_lists_hold_ids_hashes_and_urls_together(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", SHARD)
    path = listed(tmp_path / "list.txt", SHARD["hash"][0], SHARD["md5"][1].upper(), "HTTPS://X.org:443/2.jpg#a", 12)
    allowed = RowFilter(pool, RowSettings(allow=(path,)))
    assert kept(allowed, pool) == [True, True, True, False, False, False]
    assert allowed.counts == {"not_allowed": 3}
    blocked = RowFilter(pool, RowSettings(block=(path,)))
    assert kept(blocked, pool) == [False, False, False, True, True, True]
    assert blocked.counts == {"blocked": 3}


def test_an_id_is_one_whichever_sign_it_is_written_with(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", SHARD)
    path = listed(tmp_path / "list.txt", *(number % 2**64 for number in SHARD["hash"][:3]))
    assert kept(RowFilter(pool, RowSettings(block=(path,))), pool) == [False] * 3 + [True] * 3


def test_ids_are_computed_where_the_pool_records_none(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", {name: SHARD[name] for name in ("URL", "TEXT")})
    path = listed(tmp_path / "list.txt", *SHARD["hash"][4:])
    assert kept(RowFilter(pool, RowSettings(allow=(path,))), pool) == [False] * 4 + [True] * 2


@pytest.mark.parametrize("column", ["hash", "md5", "URL"])
def test_a_parquet_table_is_a_list(tmp_path: Path, column: str) -> None:
    pool = pool_of(tmp_path / "pool", SHARD, SHARD)
    folder = tmp_path / "relaion"
    folder.mkdir()
    for number in range(2):  # two parts of one list
        pq.write_table(pa.table({column: SHARD[column][number::3], "other": [1, 2]}), folder / f"{number}.parquet")
    rows = RowFilter(pool, RowSettings(allow=(str(folder),)))
    assert kept(rows, pool) == [True, True, False] * 4
    assert rows.counts == {"not_allowed": 4}


def test_a_column_of_a_parquet_list_can_be_named(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", SHARD)
    table = {
        "hash": [*SHARD["hash"][:1], 7],
        "md5": SHARD["md5"][1:3],
        "my ids": SHARD["hash"][4:],
        "any": [URLS[3], None],
    }
    pq.write_table(pa.table(table), tmp_path / "list.parquet")

    def rows_of(column: str) -> list[int]:
        mask = kept(RowFilter(pool, RowSettings(allow=(f"{tmp_path}/list.parquet{column}",))), pool)
        return np.flatnonzero(mask).tolist()

    assert rows_of("") == [0]
    assert rows_of("#MD5") == [1, 2]
    assert rows_of("#my ids") == [4, 5]
    assert rows_of("#any") == [3]


def test_a_list_of_urls_that_are_numbers(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", {"url": ["7", *URLS[:2]]})
    pq.write_table(pa.table({"url": [7, 8]}), tmp_path / "list.parquet")
    assert kept(RowFilter(pool, RowSettings(allow=(str(tmp_path / "list.parquet"),))), pool) == [True, False, False]


def test_a_row_without_an_identity_is_not_listed(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", {"url": URLS[:3], "md5": [md5("a"), None, "not a hash"]})
    path = listed(tmp_path / "list.txt", md5("a"), "0" * 32)
    assert kept(RowFilter(pool, RowSettings(allow=(path,))), pool) == [True, False, False]
    assert kept(RowFilter(pool, RowSettings(block=(path,))), pool) == [False, True, True]


def test_a_list_is_sorted_once_and_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(tmp_path / "pool", SHARD)
    first = listed(tmp_path / "list.txt", *SHARD["hash"][:2])
    same, other = listed(tmp_path / "same.txt", *SHARD["hash"][:2]), listed(tmp_path / "other.txt", 1)
    made = [RowFilter(pool, RowSettings(block=(path,))).fingerprint for path in (first, same, other)]
    assert made[0] == made[1] != made[2]
    assert RowFilter(pool, RowSettings(allow=(first,))).fingerprint != made[0]
    monkeypatch.setattr(row_lists, "_sort", None)
    assert RowList.load(first).keys["hash"].tolist() == sorted(number % 2**64 for number in SHARD["hash"][:2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one.jpg", r"list.txt, line 4: 'one.jpg' is neither an id"),
        ("ab" * 15, "is neither an id"),
        (2**64, "is neither an id"),
        ("ftp://x.org/a", "is neither an id"),
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RowList.load(listed(tmp_path / "list.txt", 5, line))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("md5", [md5("a"), None, "", md5("b")[:-1]], r"list.parquet, row 3: '[0-9a-f]{31}' is no md5; correct it or"),
        ("SHA256", ["g" * 64], r"list.parquet, row 0: 'g{64}' is no sha256"),
        ("hash", ["5", None, "x5"], r"list.parquet, row 2: 'x5' is neither an id"),
        ("hash", [1e18, None], "list.parquet: column hash holds floating-point numbers, which have lost digits"),
        ("mine", [5.0], "column mine holds floating-point numbers"),
        ("mine", ["5", "6th"], "list.parquet, row 1: '6th' is neither an id"),
    ],
)
def test_what_is_no_entry_of_a_table_is_named_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, values: list[object], message: str
) -> None:
    monkeypatch.setattr(row_lists, "_BATCH", 2)
    pq.write_table(pa.table({column: values}), tmp_path / "list.parquet")
    with pytest.raises(UsageError, match=message):
        RowList.load(f"{tmp_path}/list.parquet#{column}")


def test_rows_of_a_table_without_a_value_are_passed_over(tmp_path: Path) -> None:
    for name, values in {"md5": [md5("a"), None, ""], "hash": ["5", None, ""], "url": [None, "", URLS[0]]}.items():
        pq.write_table(pa.table({name: values}), tmp_path / "list.parquet")
        assert len(RowList.load(str(tmp_path / "list.parquet")).keys[name]) == 1


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such list of rows"):
        RowList.load(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match=r"list\.txt: a list of rows without an entry"):
        RowList.load(listed(tmp_path / "list.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not readable as a list of rows"):
        RowList.load(str(tmp_path / "binary"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match="not readable as a list of rows"):
        RowList.load(str(tmp_path / "cut.parquet"))
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "list.parquet")
    with pytest.raises(UsageError, match="one of the columns hash, md5, sha256, url; this file has caption"):
        RowList.load(str(tmp_path / "list.parquet"))


def test_what_the_pool_does_not_tell_cannot_be_asked_for(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", {"url": URLS})
    with pytest.raises(UsageError, match=r"metadata_0000.parquet: tells no punsafe, which rows.punsafe_below asks for"):
        RowFilter(pool, RowSettings(punsafe_below=0.5))
    with pytest.raises(UsageError, match=r"tells no md5, which .*list.txt asks for"):
        RowFilter(pool, RowSettings(block=(listed(tmp_path / "list.txt", md5("a")),)))
    half = pool_of(tmp_path / "half", SHARD, {"url": URLS})
    rows = RowFilter(half, RowSettings(punsafe_below=0.5))
    with pytest.raises(UsageError, match=r"metadata_0001.parquet: tells no punsafe"):
        kept(rows, half)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**64 - 1) | st.integers(-5, 5), min_size=1, max_size=300),
    st.lists(st.integers(-(2**63), 2**64 - 1) | st.integers(-9, 9), min_size=1, max_size=60),
)
def test_law_membership_is_that_of_a_set(
    tmp_path_factory: pytest.TempPathFactory, entries: list[int], asked: list[int]
) -> None:
    found = RowList.load(listed(tmp_path_factory.mktemp("law") / "list.txt", *entries))
    keys = np.array([number % 2**64 for number in asked], np.uint64)
    known = np.arange(len(asked)) % 5 != 4
    truth = {number % 2**64 for number in entries}
    expected = [number % 2**64 in truth and bool(ok) for number, ok in zip(asked, known, strict=True)]
    assert found.holds({"hash": (keys, known)}).tolist() == expected
    assert found.keys["hash"].tolist() == sorted(truth)


def test_mutated_lists_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"hash": SHARD["hash"] * 9}), tmp_path / "ids")
    pq.write_table(pa.table({"md5": SHARD["md5"] * 9}), tmp_path / "digests")
    (tmp_path / "text").write_text("\n".join([*map(str, SHARD["hash"]), *URLS, *SHARD["md5"]]), encoding="utf-8")
    refused: list[str] = []
    for whole in [path.read_bytes() for path in (tmp_path / "ids", tmp_path / "digests", tmp_path / "text")]:
        for _ in range(150):
            data = bytearray(whole)
            for place in rng.integers(len(data), size=rng.integers(1, 6)):
                data[place] = rng.integers(256)
            (tmp_path / "mutant").write_bytes(data[: rng.integers(1, 3 * len(data))])
            try:
                for kind, keys in row_lists._entries(tmp_path / "mutant", ""):
                    assert kind in row_lists.KINDS
                    assert keys.dtype == np.uint64
            except UsageError as error:
                refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in message for message in refused)
