"""Pools: what LAION published is read as it is, and every way in which files do not fit is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool.layout import Pool, open_pool


def make_pool(folder: Path, rows: tuple[int, ...] = (30, 20), dim: int = 8, digits: int = 4) -> Path:
    """A pool with LAION's own column names, image embeddings only."""
    rng = np.random.default_rng(0)
    for number, count in enumerate(rows):
        vectors = rng.normal(size=(count, dim))
        unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        name = f"{number:0{digits}d}"
        (folder / "img_emb").mkdir(parents=True, exist_ok=True)
        (folder / "metadata").mkdir(exist_ok=True)
        np.save(folder / f"img_emb/img_emb_{name}.npy", unit)
        table = {"URL": [f"u{number}-{i}" for i in range(count)], "TEXT": [f"t{number}-{i}" for i in range(count)]}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{name}.parquet")
    return folder


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return open_pool(str(make_pool(tmp_path / "pool")))


def test_rows_count_through_the_shards(pool: Pool) -> None:
    assert (pool.rows, pool.dim, len(pool.shards)) == (50, 8, 2)
    assert [shard.first_row for shard in pool.shards] == [0, 30]
    assert pool.embeddings(pool.shards[1], "image").shape == (20, 8)


def test_columns_are_found_through_aliases_in_the_order_asked_for(pool: Pool) -> None:
    table = pool.metadata([31, 2, 30], ("url", "caption", "NSFW"))
    assert table["url"].to_pylist() == ["u1-1", "u0-2", "u1-0"]
    assert table["caption"].to_pylist() == ["t1-1", "t0-2", "t1-0"]
    assert table["NSFW"].null_count == 3
    assert pool.metadata()["url"].to_pylist() == [f"u0-{i}" for i in range(30)] + [f"u1-{i}" for i in range(20)]


def test_more_digits_in_the_names_make_no_difference(tmp_path: Path) -> None:
    assert open_pool(str(make_pool(tmp_path, digits=6))).rows == 50


def test_what_is_missing_is_said_by_what_needs_it(pool: Pool) -> None:
    with pytest.raises(UsageError, match=r"no text_emb/; search it with retrieve.modalities"):
        pool.embeddings(pool.shards[0], "text")
    with pytest.raises(UsageError, match=r"no images/ shards; set retrieve.fetch=http"):
        pool.image_bytes([3])


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first, second = (open_pool(str(make_pool(tmp_path / name))) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != open_pool(str(make_pool(tmp_path / "c", rows=(30, 21)))).fingerprint


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _shorten(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def _scale(path: Path) -> None:
    np.save(path, np.load(path) * np.float16(3))


def _poison(path: Path) -> None:
    array = np.load(path)
    array[0, 0] = np.nan
    np.save(path, array)


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("img_emb/img_emb_0001.npy", _truncate, "img_emb_0001.npy: not a whole npy file"),
        ("img_emb/img_emb_0001.npy", _empty, "img_emb_0001.npy: not a whole npy file"),
        ("img_emb/img_emb_0001.npy", _shorten, "metadata_0001.parquet: 20 rows, but img_emb_0001.npy has 19"),
        ("img_emb/img_emb_0000.npy", _scale, "img_emb_0000.npy: rows are not of unit length"),
        ("img_emb/img_emb_0000.npy", _poison, "img_emb_0000.npy: rows are not of unit length"),
        ("metadata/metadata_0000.parquet", _truncate, "metadata_0000.parquet: not a whole parquet file"),
        ("metadata/metadata_0000.parquet", Path.unlink, "metadata_0000.parquet: missing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, harm, words: str) -> None:  # type: ignore[no-untyped-def]
    harm(make_pool(tmp_path) / file)
    with pytest.raises(IntegrityError, match=words):
        open_pool(str(tmp_path))


def test_a_folder_that_is_no_pool(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown pool .*give 'pocket', or a folder"):
        open_pool(str(tmp_path / "nothing"))
    (tmp_path / "img_emb").mkdir()
    with pytest.raises(UsageError, match="empty pool"):
        open_pool(str(tmp_path))
