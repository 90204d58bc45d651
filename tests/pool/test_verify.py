"""Every row of a pool looked at: what a sample would not see is found, and all that is wrong is said at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate import api
from retrieve_or_generate.cli import main
from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.pool.columns import row_hash
from retrieve_or_generate.pool.layout import open_pool
from retrieve_or_generate.pool.verify import verify_pool
from retrieve_or_generate.store import write_tar


def make_pool(folder: Path, rows: tuple[int, ...] = (600, 500), dim: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(rows):
        for kind in ("img", "text"):
            vectors = rng.normal(size=(count, dim))
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            np.save(folder / f"{kind}_emb/{kind}_emb_{number:04d}.npy", vectors.astype(np.float16))
        table = {"url": [f"u{i}" for i in range(count)], "key": [f"{i:04d}" for i in range(count)]}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number:04d}.parquet")
        write_tar(folder / f"images/{number:05d}.tar", [("0001.jpg", b"x" * 30)])
    return folder


def change(path: Path, row: int, value: float) -> None:
    array = np.load(path)
    array[row] = value
    np.save(path, array)


def test_a_pool_that_fits_together(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify_pool(open_pool(str(make_pool(tmp_path))), lambda done, total: told.append((done, total)))
    assert (found.rows, found.dim, found.shards, found.texts, found.images, found.missing) == (1100, 8, 2, 1100, 2, ())
    assert told == [(600, 1100), (1100, 1100)]


def test_rows_between_those_of_a_sample_are_seen_and_all_files_named(tmp_path: Path) -> None:
    make_pool(tmp_path)
    pool = open_pool(str(tmp_path))
    change(tmp_path / "img_emb/img_emb_0000.npy", 301, np.nan)
    change(tmp_path / "text_emb/text_emb_0001.npy", 7, 0)
    change(tmp_path / "text_emb/text_emb_0001.npy", 9, 0)
    (tmp_path / "images/00001.tar").write_bytes(b"x" * 2000)
    with pytest.raises(IntegrityError) as told:
        verify_pool(pool)
    message = str(told.value)
    assert "img_emb_0000.npy: row 301 is not finite (1 such rows of 600)" in message
    assert "text_emb_0001.npy: row 7 is of norm 0.000, not of unit length (2 such rows of 500)" in message
    assert "00001.tar: not a whole tar" in message
    assert "\n" not in message


def test_a_table_with_damage_in_its_middle(tmp_path: Path) -> None:
    path = make_pool(tmp_path) / "metadata/metadata_0000.parquet"
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"metadata_0000.parquet: its columns cannot be read"):
        verify_pool(open_pool(str(tmp_path)))


def with_ids(folder: Path, ids: list[int | None], **columns: list[str | None]) -> None:
    path = folder / "metadata/metadata_0000.parquet"
    table = pa.table({**columns, "hash": pa.array(ids, pa.int64())})
    pq.write_table(table, path)


def test_recorded_ids_are_those_of_url_and_caption(tmp_path: Path) -> None:
    """Or, as `rog index embed` has them, of the name of a row without a URL. A row without an id has none that is wrong."""
    make_pool(tmp_path, rows=(5,))
    urls, captions = ["u0", "u1", None, "", "u4"], ["a", "b", "c", "d", None]
    names = [f"{row}.jpg" for row in range(5)]
    ids = [row_hash("u0", "a"), None, row_hash("2.jpg", "c"), row_hash("3.jpg", "d"), row_hash("u4", None)]
    with_ids(tmp_path, ids, URL=urls, TEXT=captions, image_path=names)
    assert verify_pool(open_pool(str(tmp_path))).foreign_ids == 0
    with_ids(tmp_path, [*ids[:4], row_hash("u0", "a")], URL=urls, TEXT=captions, image_path=names)
    with pytest.raises(IntegrityError, match=r"hash of row 4 is not that of its URL and caption \(1 such rows of 4\)"):
        verify_pool(open_pool(str(tmp_path)))


def test_ids_of_another_making_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pool(tmp_path, rows=(4,))
    with_ids(tmp_path, [1, 2, 3, 4], URL=["u0", "u1", "u2", "u3"])
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 0
    assert "ids (hash) of 4 rows are not those of their URL and caption" in capsys.readouterr().out


def test_ids_that_are_no_numbers_are_damage(tmp_path: Path) -> None:
    make_pool(tmp_path, rows=(2,))
    pq.write_table(pa.table({"URL": ["u0", "u1"], "hash": ["5", "x"]}), tmp_path / "metadata/metadata_0000.parquet")
    with pytest.raises(IntegrityError, match=r"metadata_0000.parquet: its columns cannot be read \(.*'x'"):
        verify_pool(open_pool(str(tmp_path)))


def test_the_verb_says_what_fits_and_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pool(tmp_path, rows=(20, 20, 20))
    for name in ("img_emb/img_emb", "text_emb/text_emb"):
        (tmp_path / f"{name}_0001.npy").unlink()
    assert api.verify(tmp_path) == (0, 0)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "40 rows of dimension 8 in 2 shards fit together" in said
    assert "img_emb_0001.npy" in said
    change(tmp_path / "img_emb/img_emb_0002.npy", 3, np.inf)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 4
