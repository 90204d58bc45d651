"""`scan` against brute force: every product in float64, sorted by score and then row."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool import scan as module
from retrieve_or_generate.pool import scan_state
from retrieve_or_generate.pool.exact import pair_scores
from retrieve_or_generate.pool.filters import RowFilter
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.scan import scan, scan_pool
from retrieve_or_generate.settings import RowSettings

DTYPES = [torch.bfloat16, torch.float32]


def brute_force(
    xq: np.ndarray, xb: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    scores = (xq.astype(np.float64) @ xb.astype(np.float64).T).astype(np.float32)
    D = np.full((len(xq), k), -np.inf, np.float32)
    I = np.full((len(xq), k), -1, np.int64)  # noqa: E741  the name that faiss gave it
    rows = np.arange(len(xb)) if allowed is None else np.flatnonzero(allowed)
    for i, row in enumerate(scores):
        best = rows[np.lexsort((rows, -row[rows]))][:k]
        D[i, : len(best)], I[i, : len(best)] = row[best], best
    return D, I


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    vectors = rng.standard_normal((n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """A few tight clusters: within one, scores differ by less than a bfloat16 product can tell."""
    centres = unit(rng, 5, d)
    near = centres[rng.integers(5, size=n)] + 1e-3 * rng.standard_normal((n, d)).astype(np.float32)
    return (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 100, 5000])
def test_equals_brute_force_over_shards_of_odd_sizes(k: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(k)
    xq, xb = unit(rng, 9, 48), unit(rng, 3001, 48).astype(np.float16)
    found = scan(xq, np.split(xb, [1, 640, 641, 2000]), k, block_rows=300, product_dtype=dtype)
    assert_same(found, brute_force(xq, xb, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_tighter_than_the_narrow_product_can_tell(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    xb = clustered(rng, 4000, 64)
    xq = xb[rng.integers(len(xb), size=12)].astype(np.float32)
    assert_same(scan(xq, [xb], 50, block_rows=512, product_dtype=dtype), brute_force(xq, xb, 50))


def test_ties_go_to_the_lower_row_across_blocks_and_shards() -> None:
    rng = np.random.default_rng(2)
    few = unit(rng, 4, 32).astype(np.float16)
    xb = few[rng.integers(4, size=1000)]
    xq = np.concatenate([unit(rng, 3, 32), few.astype(np.float32)])
    assert_same(scan(xq, np.split(xb, 3 * [250] and [250, 500]), 40, block_rows=128), brute_force(xq, xb, 40))


def test_only_allowed_rows_are_found() -> None:
    rng = np.random.default_rng(3)
    xq, xb = unit(rng, 5, 24), unit(rng, 900, 24).astype(np.float16)
    allowed = rng.random(900) < 0.3
    allowed[300:600] = False
    found = scan(xq, np.split(xb, [300, 600]), 20, allowed=np.split(allowed, [300, 600]), block_rows=64)
    assert_same(found, brute_force(xq, xb, 20, allowed))


def test_fewer_rows_than_k_are_padded() -> None:
    D, I = scan(np.ones((2, 3), np.float32), [np.zeros((0, 3), np.float16), np.ones((2, 3), np.float16)], 4)  # noqa: E741
    np.testing.assert_array_equal(I, [[0, 1, -1, -1]] * 2)
    np.testing.assert_array_equal(D, [[3, 3, -np.inf, -np.inf]] * 2)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int, np.ndarray, list[int]]:
    """Vectors of any scale and sign, many of them equal or opposite, in shards and blocks of any size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    d, n, q = draw(st.integers(1, 40)), draw(st.integers(1, 120)), draw(st.integers(1, 4))
    scale = draw(st.sampled_from([1e-4, 1.0, 50.0]))
    base = rng.standard_normal((draw(st.integers(1, n)), d)) * scale
    xb = (base[rng.integers(len(base), size=n)] * rng.choice([1, -1], size=(n, 1))).astype(np.float16)
    xq = (rng.standard_normal((q, d)) * scale).astype(np.float32)
    if draw(st.booleans()):
        xq, xb = np.abs(xq), -np.abs(xb)
    allowed = rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    return xq, xb, draw(st.integers(1, 2 * n)), draw(st.integers(n // 6 + 1, 150)), allowed, cuts


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(DTYPES))
def test_law_equals_brute_force(
    case: tuple[np.ndarray, np.ndarray, int, int, np.ndarray, list[int]], dtype: torch.dtype
) -> None:
    xq, xb, k, block_rows, allowed, cuts = case
    found = scan(xq, np.split(xb, cuts), k, allowed=np.split(allowed, cuts), block_rows=block_rows, product_dtype=dtype)
    assert_same(found, brute_force(xq, xb, k, allowed))


def test_more_queries_than_one_product_takes_and_progress() -> None:
    rng = np.random.default_rng(4)
    xq, xb = unit(rng, 1500, 16), unit(rng, 400, 16).astype(np.float16)
    passed: list[int] = []
    assert_same(scan(xq, [xb[:250], xb[250:]], 5, block_rows=100, progress=passed.append), brute_force(xq, xb, 5))
    assert passed == [100, 200, 250, 350, 400]


def test_a_memory_mapped_shard_is_read_in_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    xq, xb = unit(rng, 3, 16), unit(rng, 200, 16).astype(np.float16)
    path = tmp_path / "img_emb_0000.npy"
    np.save(path, xb)
    assert_same(scan(xq, [np.load(path, mmap_mode="r")], 10), brute_force(xq, xb, 10))


def test_pair_scores_are_those_of_scan() -> None:
    rng = np.random.default_rng(6)
    xq, xb = unit(rng, 4, 100), unit(rng, 500, 100).astype(np.float16)
    D, I = scan(xq, [xb], 300)  # noqa: E741
    query = np.repeat(np.arange(4), 300)
    np.testing.assert_array_equal(pair_scores(xq, xb, query, I.ravel()).reshape(4, 300), D)


def test_inputs_that_do_not_fit_are_refused() -> None:
    xq, xb = np.ones((1, 4), np.float32), np.ones((3, 4), np.float16)
    with pytest.raises(ValueError, match="k is at least 1"):
        scan(xq, [xb], 0)
    with pytest.raises(ValueError, match="float16 like the queries"):
        scan(xq, [xb.astype(np.float32)], 1)
    with pytest.raises(ValueError, match="not finite"):
        scan(xq, [np.full((3, 4), np.nan, np.float16)], 1)
    with pytest.raises(ValueError, match="not finite"):
        scan(np.full((1, 4), np.inf), [xb], 1)
    with pytest.raises(ValueError, match="mask"):
        scan(xq, [xb], 1, allowed=[np.ones(2, bool)])


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> int:
    """A sample so small that a pool of a test is large beside it; how many rows it has."""
    rows = 64
    monkeypatch.setattr(module, "_SAMPLE_ROWS", rows)
    return rows


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many queries each pass from here on has, and whether it opens with a guess."""
    made: list[tuple[int, bool]] = []
    real = module.Nearest

    def nearest(xq: np.ndarray, k: int, **more: object) -> object:
        if "floor" in more:
            made.append((len(xq), more["floor"] is not None))
        return real(xq, k, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "Nearest", nearest)
    return made


@pytest.mark.parametrize("k", [1, 20])
def test_a_guess_changes_nothing(k: int, small_sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(k)
    xq, xb = unit(rng, 30, 24), unit(rng, 6000, 24).astype(np.float16)
    made = passes(monkeypatch)
    assert_same(scan(xq, np.split(xb, [100, 100, 3500]), k, block_rows=512), brute_force(xq, xb, k))
    assert made == [(30, True)]


def test_a_query_that_its_guess_failed_is_searched_again(small_sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    xq, xb = unit(rng, 6, 16), unit(rng, 5000, 16).astype(np.float16)
    sample = np.linspace(0, len(xb) - 1, small_sample).astype(int)
    xb[sample] = xq[2]  # every sampled row is the best row of one query
    made = passes(monkeypatch)
    assert_same(scan(xq, [xb], 100, block_rows=512), brute_force(xq, xb, 100))
    assert made[0] == (6, True)
    assert made[1:] == [(made[1][0], False)]
    assert 1 <= made[1][0] < 6


def test_equal_scores_at_the_guess_are_all_found(small_sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    few = unit(rng, 3, 16).astype(np.float16)
    xb = few[rng.integers(3, size=2000)]
    made = passes(monkeypatch)
    assert_same(scan(few.astype(np.float32), [xb], 50, block_rows=256), brute_force(few.astype(np.float32), xb, 50))
    assert made == [(3, True)]


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(2, 12))
def test_law_with_a_guess_equals_brute_force(
    case: tuple[np.ndarray, np.ndarray, int, int, np.ndarray, list[int]], sample: int
) -> None:
    xq, xb, k, block_rows, _, cuts = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLE_ROWS", sample)
        patch.setattr(module, "_SURE", 0.1)  # guesses that fail often
        found = scan(xq, np.split(xb, cuts), k, block_rows=block_rows)
    assert_same(found, brute_force(xq, xb, k))


def test_a_shard_cut_short_while_it_is_mapped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "img_emb_0000.npy"
    np.save(path, np.ones((2000, 16), np.float16))
    shard = np.load(path, mmap_mode="r")
    os.truncate(path, 30_000)
    with pytest.raises(ValueError, match="ends before its last row"):
        scan(np.ones((1, 16), np.float32), [shard], 3)


def write_pool(
    folder: Path, rows: list[int], dim: int = 16, **columns: np.ndarray
) -> tuple[Pool, np.ndarray, np.ndarray]:
    """A pool of shards of so many rows, with image and text embeddings; both as one array."""
    rng = np.random.default_rng(sum(rows))
    image, text = (unit(rng, sum(rows), dim).astype(np.float16) for _ in range(2))
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    first = 0
    for number, size in enumerate(rows):
        part = slice(first, first + size)
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", image[part])
        np.save(folder / f"text_emb/text_emb_{number:04d}.npy", text[part])
        told = {"url": [f"http://x.org/{row}" for row in range(*part.indices(sum(rows)))]}
        told |= {name: values[part] for name, values in columns.items()}
        pq.write_table(pa.table(told), folder / f"metadata/metadata_{number:04d}.parquet")
        first += size
    return open_pool(str(folder)), image, text


ROWS = [300, 1, 450, 200, 49]


def test_a_pool_is_scanned_in_one_pass_over_both_embeddings(tmp_path: Path) -> None:
    pool, image, text = write_pool(tmp_path, ROWS)
    xq = unit(np.random.default_rng(0), 7, 16)
    told: list[tuple[int, int]] = []
    found = scan_pool(pool, xq, 20, ("image", "text"), progress=lambda *bytes_: told.append(bytes_))
    assert list(found) == ["image", "text"]
    assert_same(found["image"], brute_force(xq, image, 20))
    assert_same(found["text"], brute_force(xq, text, 20))
    assert told == sorted(told)
    assert told[-1] == (2 * 2 * 16 * 1000, 2 * 2 * 16 * 1000)


def test_a_pool_is_scanned_with_a_guess(tmp_path: Path, small_sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, image, text = write_pool(tmp_path, ROWS)
    image_query = image[np.linspace(0, 999, small_sample).astype(int)][:1].astype(np.float32)
    xq = np.concatenate([unit(np.random.default_rng(1), 5, 16), image_query])
    made = passes(monkeypatch)
    found = scan_pool(pool, xq, 4, ("image", "text"), state=tmp_path / "state")
    assert_same(found["image"], brute_force(xq, image, 4))
    assert_same(found["text"], brute_force(xq, text, 4))
    assert made[:2] == [(6, True), (6, True)]


def test_filtered_rows_are_not_found_and_are_counted(tmp_path: Path) -> None:
    punsafe = np.random.default_rng(2).random(1000)
    pool, image, _ = write_pool(tmp_path, ROWS, punsafe=punsafe)
    xq = unit(np.random.default_rng(3), 4, 16)
    rows = RowFilter(pool, RowSettings(punsafe_below=0.4))
    found = scan_pool(pool, xq, 30, rows=rows)
    assert_same(found["image"], brute_force(xq, image, 30, punsafe < 0.4))
    assert rows.counts == {"unsafe": int((punsafe >= 0.4).sum())}


def test_what_a_damaged_shard_lacks_names_its_file(tmp_path: Path) -> None:
    pool, image, _ = write_pool(tmp_path, ROWS)
    image[310] = np.nan
    np.save(tmp_path / "img_emb/img_emb_0002.npy", image[301:751])
    with pytest.raises(IntegrityError, match=r"img_emb_0002.npy: a shard holds values that are not finite"):
        scan_pool(pool, unit(np.random.default_rng(0), 2, 16), 5)


def as_bytes(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    file = io.BytesIO()
    for D, I in found.values():  # noqa: E741
        np.save(file, D)
        np.save(file, I)
    return file.getvalue()


def scanned(
    folder: Path, state: Path | None, passed: Callable[[int, int], None] | None = None
) -> tuple[bytes, dict[str, int]]:
    pool = open_pool(str(folder))
    rows = RowFilter(pool, RowSettings(punsafe_below=0.5))
    xq = unit(np.random.default_rng(4), 9, 16)
    found = scan_pool(pool, xq, 25, ("image", "text"), rows=rows, state=state, progress=passed)
    return as_bytes(found), rows.counts


class Killed(BaseException):
    """Ends a scan as a kill does: from then on no file changes any more."""


def scan_killed_at(folder: Path, state: Path, call: int) -> bool:
    """Scan, and end before the `call`-th time that a file of `state` takes its name or goes; whether it came to that."""
    steps = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **more: object) -> object:
            nonlocal steps
            steps += state in Path(str(args[0])).parents
            if steps >= call:
                raise Killed
            return real(*args, **more)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_state, "_PAUSE", 0)
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            scanned(folder, state)
        except Killed:
            return True
    return False


def test_a_scan_killed_at_any_step_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", [20, 30, 10], punsafe=np.random.default_rng(5).random(60))
    expected = scanned(tmp_path / "pool", None)
    call = 1
    while scan_killed_at(tmp_path / "pool", state := tmp_path / f"state-{call}", call):
        assert scanned(tmp_path / "pool", state) == expected
        assert sorted(path.name for path in state.iterdir()) == [".lock", "best-000003.npz", "scan.json"]
        call += 1
    assert call > 12


def test_a_scan_that_goes_on_passes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_state, "_PAUSE", 0)
    write_pool(tmp_path / "pool", ROWS, punsafe=np.random.default_rng(5).random(1000))

    def stop_late(done: int, everything: int) -> None:
        if done > 0.8 * everything:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scanned(tmp_path / "pool", tmp_path / "state", stop_late)
    told: list[int] = []
    went_on = scanned(tmp_path / "pool", tmp_path / "state", lambda done, _: told.append(done))
    assert told[0] > 0.7 * told[-1]
    assert went_on == scanned(tmp_path / "pool", None)
    again: list[int] = []
    assert scanned(tmp_path / "pool", tmp_path / "state", lambda done, _: again.append(done)) == went_on
    assert again == []


def test_the_state_of_another_scan_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    pool, _, _ = write_pool(tmp_path / "pool", ROWS)
    xq = unit(np.random.default_rng(4), 3, 16)
    scan_pool(pool, xq, 5, state=tmp_path / "state")
    with pytest.raises(UsageError, match="holds a scan of other queries"):
        scan_pool(pool, xq[:2], 5, state=tmp_path / "state")
    [kept] = (tmp_path / "state").glob("best-*.npz")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    with pytest.raises(IntegrityError, match="its bytes changed"):
        scan_pool(pool, xq, 5, state=tmp_path / "state")


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 100, 3000])
def test_a_gpu_finds_what_the_processor_finds(k: int) -> None:
    rng = np.random.default_rng(k)
    xq, xb = unit(rng, 1100, 96), clustered(rng, 200_000, 96)
    shards = np.split(xb, [70_000, 70_001])
    cpu, gpu = scan(xq, shards, k), scan(xq, shards, k, device="cuda")
    np.testing.assert_allclose(gpu[0], cpu[0], rtol=0, atol=1e-7)
    odd = cpu[1] != gpu[1]
    np.testing.assert_array_equal(cpu[0][odd], gpu[0][odd])  # two sums in float64 may round to one float32 apart
    assert odd.mean() < 1e-4


@pytest.mark.gpu
def test_a_gpu_takes_masks_and_small_blocks() -> None:
    rng = np.random.default_rng(0)
    xq, xb = unit(rng, 20, 48), unit(rng, 9000, 48).astype(np.float16)
    allowed = rng.random(9000) < 0.2
    found = scan(xq, np.split(xb, [4000]), 50, allowed=np.split(allowed, [4000]), block_rows=700, device="cuda:0")
    assert_same(found, brute_force(xq, xb, 50, allowed))


LARGE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from retrieve_or_generate.settings import RowSettings
from retrieve_or_generate.pool.filters import RowFilter
from retrieve_or_generate.pool.layout import open_pool
from retrieve_or_generate.pool.scan import scan_pool

folder = Path(sys.argv[1])
pool = open_pool(str(folder / "pool"))
rows = RowFilter(pool, RowSettings(punsafe_below=0.9, allow=(str(folder / "allow.parquet"),)))
D, I = scan_pool(pool, np.load(folder / "xq.npy"), 1000, rows=rows, state=folder / "state")["image"]
told = pool.metadata(np.unique(I[:, :100]), ("hash", "punsafe"))
assert max(told["punsafe"].to_pylist()) < 0.9
np.savez(folder / "found.npz", D=D, I=I)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"rows": pool.rows, "selected": len(told), "counts": rows.counts, "memory_gib": memory}))
"""


def write_large_pool(folder: Path, rows: int, shards: int, dim: int) -> None:
    """Unit vectors with `punsafe` and an id for each, and a list that allows three rows of four."""
    for name in ("pool/img_emb", "pool/metadata"):
        (folder / name).mkdir(parents=True)
    size = rows // shards
    allowed = pq.ParquetWriter(folder / "allow.parquet", pa.schema([("hash", pa.int64())]))
    for number in range(shards):
        rng = np.random.default_rng(number)
        np.save(folder / f"pool/img_emb/img_emb_{number:04d}.npy", unit(rng, size, dim).astype(np.float16))
        ids = rng.integers(-(2**63), 2**63 - 1, size)
        told = pa.table({"hash": ids, "punsafe": rng.random(size)})
        pq.write_table(told, folder / f"pool/metadata/metadata_{number:04d}.parquet")
        allowed.write_table(pa.table({"hash": ids[np.arange(size) % 4 != 3]}))
    allowed.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two; longer on a loaded machine
def test_ten_million_rows_are_scanned_filtered_and_selected_in_bounded_memory(tmp_path: Path) -> None:
    rows, shards, dim = 10_000_000, 10, 32
    write_large_pool(tmp_path, rows, shards, dim)
    xq = unit(np.random.default_rng(99), 200, dim)
    np.save(tmp_path / "xq.npy", xq)
    environment = {**os.environ, "ROG_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", LARGE, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["memory_gib"] < 1.5  # of which torch takes 0.7 when it is imported
    pool = open_pool(str(tmp_path / "pool"))
    punsafe = pool.metadata(columns=("punsafe",))["punsafe"].to_numpy()
    allowed = (punsafe < 0.9) & (np.arange(rows) % 4 != 3)
    assert sum(told["counts"].values()) == rows - allowed.sum()
    scores = np.concatenate(
        [pool.embeddings(s, "image").astype(np.float64) @ xq[:3].T.astype(np.float64) for s in pool.shards]
    )
    with np.load(tmp_path / "found.npz") as found:
        for number, column in enumerate(scores.T.astype(np.float32)):
            column[~allowed] = -np.inf
            best = np.lexsort((np.arange(rows), -column))[:1000]
            np.testing.assert_array_equal(found["I"][number], best)
            np.testing.assert_array_equal(found["D"][number], column[best])
