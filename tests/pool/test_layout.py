"""Pools: what LAION published is read as it is, and every way in which files do not fit is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate.errors import IncompleteError, IntegrityError, UsageError
from retrieve_or_generate.pool import layout
from retrieve_or_generate.pool.columns import read_columns
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.parts import open_embeddings
from retrieve_or_generate.pool.tars import members
from retrieve_or_generate.store import seal, write_tar


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


def test_an_image_that_is_not_the_recorded_one_is_named(tmp_path: Path) -> None:
    make_pool(tmp_path, rows=(3,))
    images = [b"one", b"another", b"not here"]
    digests = [hashlib.md5(image, usedforsecurity=False).hexdigest() for image in images]
    table = {"URL": list("abc"), "key": ["k0", "k1", "k2"], "md5": digests}
    pq.write_table(pa.table(table), tmp_path / "metadata/metadata_0000.parquet")
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "images/00000.tar", [("k0.jpg", b"one"), ("k1.png", b"changed")])
    pool = open_pool(str(tmp_path))
    assert pool.image_bytes([0, 2]) == {0: b"one"}
    with pytest.raises(IntegrityError, match=r"00000.tar: image k1 does not match the md5 in .*metadata_0000.parquet"):
        pool.image_bytes([0, 1])


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
        ("img_emb/img_emb_0000.npy", _scale, r"img_emb_0000.npy: row 0 is of norm 3\.00\d, not of unit"),
        ("img_emb/img_emb_0000.npy", _poison, r"img_emb_0000.npy: row 0 is not finite \(1 such rows of 30\)"),
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


def unit(rows: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def test_laion_as_it_was_published(tmp_path: Path) -> None:
    """Its tables lie in a folder of another name, with img2dataset's columns; `width` there is what the downloader made of it."""
    pool = make_pool(tmp_path / "laion2B-en")
    (pool / "metadata").rename(pool / "laion2B-en-metadata")
    table = {
        "image_path": ["000000001", "000000002"] * 15,
        "caption": ["a", None] * 15,
        "NSFW": ["UNLIKELY", "NSFW"] * 15,
        "similarity": [0.3, None] * 15,
        "LICENSE": ["?", None] * 15,
        "url": ["http://x/1", "http://x/2"] * 15,
        "width": pa.array([256, 256] * 15, pa.int32()),
        "original_width": pa.array([1000, 640] * 15, pa.int32()),
        "md5": ["0" * 32] * 30,
    }
    pq.write_table(pa.table(table), pool / "laion2B-en-metadata/metadata_0000.parquet")
    found = open_pool(str(pool)).metadata([1, 40], ("key", "width", "hash", "similarity", "LICENSE"))
    assert found["key"].to_pylist() == ["000000002", None]
    assert found["width"].to_pylist() == [640.0, None]
    assert found["hash"].to_pylist() == [mmh3.hash64(b"http://x/2")[0], mmh3.hash64(b"u1-10t1-10")[0]]
    assert found.schema.field("similarity").type == pa.float64()


def test_tables_may_also_lie_beside_the_embeddings(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "laion2B-multi")
    (pool / "metadata").rename(tmp_path / "laion2B-multi-metadata")
    assert open_pool(str(pool)).rows == 50


def test_columns_of_other_types_are_read_as_one_type(tmp_path: Path) -> None:
    make_pool(tmp_path, rows=(2, 2))
    for number, (hashes, sizes) in enumerate([(["-5", "7"], [1.0, None]), (pa.array([8, 9], pa.int64()), [3, 4])]):
        words = pa.array(["a", "b"]).dictionary_encode()
        table = {"URL": words, "TEXT": pa.array(["c", "d"], pa.large_string()), "hash": hashes, "WIDTH": sizes}
        pq.write_table(pa.table(table), tmp_path / f"metadata/metadata_{number:04d}.parquet")
    found = open_pool(str(tmp_path)).metadata(columns=("url", "caption", "hash", "width"))
    assert found["hash"].to_pylist() == [-5, 7, 8, 9]
    assert found["width"].to_pylist() == [1.0, None, 3.0, 4.0]
    assert found["caption"].to_pylist() == ["c", "d"] * 2


def test_rows_of_a_table_in_many_row_groups(tmp_path: Path) -> None:
    make_pool(tmp_path, rows=(30,))
    path = tmp_path / "metadata/metadata_0000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    rows = [29, 0, 13, 14, 13, 6, 7]
    assert open_pool(str(tmp_path)).metadata(rows)["url"].to_pylist() == [f"u0-{row}" for row in rows]


def test_shards_are_ordered_by_number_however_it_is_written(tmp_path: Path) -> None:
    make_pool(tmp_path, rows=tuple(range(1, 12)), digits=1)
    (tmp_path / "img_emb/img_emb_3.npy").rename(tmp_path / "img_emb/img_emb_0003.npy")
    assert [shard.rows for shard in open_pool(str(tmp_path)).shards] == list(range(1, 12))
    (tmp_path / "img_emb/img_emb_03.npy").write_bytes((tmp_path / "img_emb/img_emb_0003.npy").read_bytes())
    with pytest.raises(IntegrityError, match=r"img_emb_03.npy: the same shard as img_emb_0003.npy"):
        open_pool(str(tmp_path))


def test_datacomp_npz_files(tmp_path: Path) -> None:
    """Stored arrays are mapped where they lie, compressed ones are read."""
    for number, save in enumerate((np.savez, np.savez_compressed)):
        arrays = {
            "l14_img": unit(5, seed=number),
            "l14_txt": unit(5, seed=9),
            "b32_img": unit(5, 4),
            "dedup": unit(5, 3),
        }
        save(tmp_path / f"{number:032x}.npz", **arrays)
        table = {"uid": list("abcde"), "text": list("fghij"), "clip_l14_similarity_score": [0.1] * 5}
        pq.write_table(pa.table(table), tmp_path / f"{number:032x}.parquet")
    pool = open_pool(str(tmp_path))
    assert (pool.rows, pool.dim) == (10, 8)
    for number, shard in enumerate(pool.shards):
        assert np.array_equal(pool.embeddings(shard, "image"), unit(5, seed=number))
        assert np.array_equal(pool.embeddings(shard, "text"), unit(5, seed=9))
    assert isinstance(pool.embeddings(pool.shards[0], "image"), np.memmap)
    assert pool.metadata([6], ("key", "caption", "similarity")).to_pylist() == [
        {"key": "b", "caption": "g", "similarity": 0.1}
    ]


def test_several_pools_follow_each_other_in_the_published_order(tmp_path: Path) -> None:
    sizes = {"laion1B-nolang": 3, "laion2B-en": 30, "laion2B-multi": 20}
    for name, rows in sizes.items():
        make_pool(tmp_path / name, rows=(rows,))
    pool = open_pool(str(tmp_path))
    assert [part.name for part in pool.parts] == ["laion2B-en", "laion2B-multi", "laion1B-nolang"]
    assert [(shard.first_row, shard.rows) for shard in pool.shards] == [(0, 30), (30, 20), (50, 3)]
    assert pool.metadata([52, 0, 31])["url"].to_pylist() == ["u0-2", "u0-0", "u0-1"]
    before = pool.fingerprint
    make_pool(tmp_path / "laion1B-nolang", rows=(4,))
    assert open_pool(str(tmp_path)).fingerprint != before


def test_a_list_names_parts_in_another_order_and_the_model(tmp_path: Path) -> None:
    for name, rows in (("a", 2), ("b", 3)):
        make_pool(tmp_path / name, rows=(rows,))
    listed = tmp_path / "pool.yaml"
    listed.write_text("name: both\nmodel: ViT-L-14/openai\nparts: [b, a]\n")
    for name in (tmp_path, listed):
        pool = open_pool(str(name))
        assert (pool.name, pool.model, pool.folder) == ("both", "ViT-L-14/openai", tmp_path)
        assert [shard.rows for shard in pool.shards] == [3, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parts: [a, c]", r"pool.yaml: part .*/c has neither img_emb/ nor npz files"),
        ("parts: []", "parts is empty"),
        ("part: [a]", r"pool.yaml: parts: field required"),
        ("parts: [a]\nparts_: [b]", r"pool.yaml: unknown key 'parts_'; did you mean 'parts'\?"),
        ("parts: a", r"pool.yaml: parts: input should be a list, such as \[a, b\], not 'a'"),
        ("parts: [1]", "pool.yaml: parts.0: input should be a valid string, not '1'"),
        ("parts: [", "not readable as YAML"),
        ("- a", "pool.yaml: a list of a pool's parts is a mapping of keys to values"),
        ("", "is a mapping of keys to values"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    make_pool(tmp_path / "a")
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        open_pool(str(tmp_path))


def test_parts_of_different_dimension_do_not_make_one_pool(tmp_path: Path) -> None:
    make_pool(tmp_path / "a")
    make_pool(tmp_path / "b", dim=6)
    with pytest.raises(IntegrityError, match=r"b/img_emb/img_emb_0000.npy: dimension 6, but .*a/img_emb/.* has 8"):
        open_pool(str(tmp_path))


def test_parts_by_different_models_do_not_make_one_pool(tmp_path: Path) -> None:
    for name, model in (("a", "ViT-L-14/openai"), ("b", "pocket")):
        part = make_pool(tmp_path / name)
        files = [path for path in part.rglob("*") if path.is_file()]
        seal(part, "pool.json", "k", files, pool=name, model=model, rows=50)
    with pytest.raises(IntegrityError, match=r"parts embedded by different models \(ViT-L-14/openai, pocket\)"):
        open_pool(str(tmp_path))
    assert open_pool(str(tmp_path / "b")).model == "pocket"
    (tmp_path / "pool.yaml").write_text("model: pocket\nparts: [a]\n")
    with pytest.raises(IntegrityError, match="embedded by different models"):
        open_pool(str(tmp_path))


def test_text_embeddings_of_some_shards_only(tmp_path: Path) -> None:
    make_pool(tmp_path)
    (tmp_path / "text_emb").mkdir()
    np.save(tmp_path / "text_emb/text_emb_0000.npy", unit(30))
    with pytest.raises(IntegrityError, match=r"text_emb_0001.npy: missing"):
        open_pool(str(tmp_path))
    np.save(tmp_path / "text_emb/text_emb_0001.npy", unit(20, dim=7))
    with pytest.raises(IntegrityError, match=r"text_emb_0001.npy: shape \(20, 7\) does not fit"):
        open_pool(str(tmp_path))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (unit(30).astype(np.float32), "numbers of type '<f4'; a pool holds float16 row by row"),
        (np.asfortranarray(unit(30)), "column by column"),
        (unit(30)[0], r"shape \(8,\), expected \(rows, dim\)"),
        (unit(30)[:0], r"shape \(0, 8\), expected"),
        (np.array([object()]), r"shape \(1,\)"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    make_pool(tmp_path)
    np.save(tmp_path / "img_emb/img_emb_0000.npy", array)
    with pytest.raises(IntegrityError, match=rf"img_emb_0000.npy: .*{words}"):
        open_pool(str(tmp_path))


def test_a_pool_that_is_not_finished_is_not_opened(tmp_path: Path) -> None:
    make_pool(tmp_path)
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(IncompleteError, match="run rog index embed again"):
        open_pool(str(tmp_path))


def test_a_large_sealed_pool_is_opened_by_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pool(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    seal(tmp_path, "pool.json", "k", files, pool="mine", model="m", rows=50)
    path = tmp_path / "metadata/metadata_0001.parquet"
    path.write_bytes(path.read_bytes()[:-4] + b"PAR2")
    with pytest.raises(IntegrityError, match="its bytes changed"):
        open_pool(str(tmp_path))
    monkeypatch.setattr(layout, "_CHECKSUM_BYTES", 0)
    with pytest.raises(IntegrityError, match=r"metadata_0001.parquet: not a whole parquet"):
        open_pool(str(tmp_path))
    path.write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"metadata_0001.parquet: 0 bytes, but \d+ bytes were recorded"):
        open_pool(str(tmp_path))


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flipped bits, cut ends, and overwritten, doubled and removed stretches."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        noise = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        match rng.integers(5):
            case 0:
                yield data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
            case 1:
                yield data[:at]
            case 2:
                yield data[:at] + noise + data[at + length :]
            case 3:
                yield data[:at] + data[max(at - length, 0) :]
            case _:
                yield data[:at] + data[at + length :]


COUNTS = pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])


def outcome(work: Callable[[], object]) -> str:
    """What a reader says to a file: nothing, or the one kind of error that damage may end in."""
    try:
        work()
    except IntegrityError as error:
        return str(error)
    return ""


def read_all(path: Path, count: int, seed: int, work: Callable[[], object]) -> int:
    """Have `count` mutants of the file read; how many were refused, each naming the file."""
    whole, refused = path.read_bytes(), 0
    for data in mutants(whole, count, seed):
        path.write_bytes(data)
        told = outcome(work)
        assert not told or path.name in told
        refused += bool(told)
    return refused


@COUNTS
def test_mutated_npy_files_are_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "img_emb_0000.npy"
    np.save(path, unit(4, 4))
    assert read_all(path, count, 1, lambda: open_embeddings(path, "image").tobytes()) > count / 10


@COUNTS
def test_mutated_npz_files_are_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, l14_img=unit(4, 4), l14_txt=unit(4, 4))
    assert read_all(path, count, 2, lambda: open_embeddings(path, "image").tobytes()) > count / 10


@COUNTS
def test_mutated_parquet_files_are_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "metadata_0000.parquet"
    pq.write_table(pa.table({"URL": ["u"] * 20, "TEXT": list("abcdefghijklmnopqrst"), "hash": range(20)}), path)
    assert read_all(path, count, 3, lambda: read_columns(path, ("url", "caption", "hash"))) > count / 10


@COUNTS
def test_mutated_tars_are_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "00000.tar"
    names = [f"{i:03d}.{suffix}" for i in range(3) for suffix in ("jpg", "txt")]
    write_tar(path, [(name, b"x" * 700) for name in names])
    assert [one.name for one in members(path)] == names

    def read() -> None:
        assert all(one.offset + one.size <= path.stat().st_size for one in members(path))

    assert read_all(path, count, 4, read) > count / 10
