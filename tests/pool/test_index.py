"""FAISS indexes over a small pool on disk, against the exact scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.models import load_clip, text_features
from retrieve_or_generate.pool.index import (
    INDEX,
    INDEX_SEAL,
    RECIPES,
    IndexRecipe,
    build_index,
    load_recipe,
    measure_recall,
    search_index,
)
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.scan import scan
from retrieve_or_generate.tasks import load_task

DIM, K = 32, 20
RECIPE = IndexRecipe(
    name="test",
    pool="clusters",
    model="none",
    modality="image",
    factory_string="IVF32,SQ8",
    nprobe=4,
    train_rows=1500,
    seed=3,
)


def clusters(rng: np.random.Generator, n: int) -> np.ndarray:
    centres = np.random.default_rng(0).standard_normal((40, DIM))
    vectors = centres[rng.integers(40, size=n)] + 0.8 * rng.standard_normal((n, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_pool(folder: Path, vectors: np.ndarray, shard_rows: int = 1700) -> Pool:
    for number, start in enumerate(range(0, len(vectors), shard_rows)):
        part = vectors[start : start + shard_rows].astype(np.float16)
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", part)
        table = pa.table({"url": [f"http://x/{start + i}" for i in range(len(part))], "caption": ["c"] * len(part)})
        pq.write_table(table, folder / f"metadata/metadata_{number:04d}.parquet")
    return open_pool(str(folder))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    vectors = clusters(np.random.default_rng(1), 3000)
    vectors[100:110] = vectors[5]
    return write_pool(tmp_path_factory.mktemp("pools") / "clusters", vectors)


@pytest.fixture(scope="module")
def built(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_index(pool, RECIPE, tmp_path_factory.mktemp("index"))


QUERIES = clusters(np.random.default_rng(2), 120)


def exact(pool: Pool, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    return scan(QUERIES, (pool.embeddings(shard, "image") for shard in pool.shards), k)


@pytest.mark.parametrize("factory_string", ["Flat", "IVF32,Flat", "IVF32,SQ8", "PCA16,IVF32,PQ8x4fs", "HNSW16"])
def test_every_list_probed_and_enough_fetched_is_exact(factory_string: str, pool: Pool, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"factory_string": factory_string})
    folder = build_index(pool, recipe, tmp_path / "index")
    D, I = search_index(folder, pool, QUERIES, K, nprobe=32, overfetch=150)  # noqa: E741
    true_D, true_I = exact(pool)
    if factory_string == "HNSW16":  # its graph may not reach every row
        found = (true_I == I).all(1)
        assert found.mean() > 0.5
        D, I, true_D, true_I = D[found], I[found], true_D[found], true_I[found]  # noqa: E741
    np.testing.assert_array_equal(I, true_I)
    np.testing.assert_array_equal(D, true_D)


def test_scores_are_exact_and_recall_grows_with_nprobe(pool: Pool, built: Path) -> None:
    recalls = [measure_recall(built, pool, QUERIES, K, nprobe) for nprobe in (1, 4, 32)]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[1] < 1
    assert recalls[2] > 0.95
    D, I = search_index(built, pool, QUERIES, K)  # noqa: E741
    vectors = np.concatenate([pool.embeddings(shard, "image") for shard in pool.shards])
    expected = np.einsum("qd,qkd->qk", QUERIES.astype(np.float64), vectors[I].astype(np.float64))
    np.testing.assert_array_equal(D, expected.astype(np.float32))
    assert (np.diff(D, axis=1) <= 0).all()


def test_nprobe_of_one_call_changes_no_other(pool: Pool, built: Path) -> None:
    before = search_index(built, pool, QUERIES, K)
    search_index(built, pool, QUERIES, K, nprobe=1)
    np.testing.assert_array_equal(search_index(built, pool, QUERIES, K)[1], before[1])


def test_more_than_there_is_is_padded(pool: Pool, built: Path) -> None:
    D, I = search_index(built, pool, QUERIES[:1], pool.rows + 5, nprobe=1)  # noqa: E741
    found = int((I >= 0).sum())
    assert 0 < found < pool.rows
    assert np.isneginf(D[0, found:]).all()
    assert (I[0, found:] == -1).all()


def test_built_once_and_the_same_bytes_again(pool: Pool, built: Path, tmp_path: Path) -> None:
    stamp = (built / INDEX).stat().st_mtime_ns
    build_index(pool, RECIPE.model_copy(update={"nprobe": 9}), built)
    assert (built / INDEX).stat().st_mtime_ns == stamp
    again = build_index(pool, RECIPE, tmp_path / "again")
    assert (again / INDEX).read_bytes() == (built / INDEX).read_bytes()


def test_one_changed_byte_is_told(pool: Pool, tmp_path: Path) -> None:
    folder = build_index(pool, RECIPE, tmp_path / "index")
    data = bytearray((folder / INDEX).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / INDEX).write_bytes(data)
    with pytest.raises(IntegrityError, match="its bytes changed"):
        search_index(folder, pool, QUERIES, K)


def test_what_does_not_belong_together(pool: Pool, built: Path, tmp_path: Path) -> None:
    other = write_pool(tmp_path / "clusters", clusters(np.random.default_rng(9), 500))
    with pytest.raises(UsageError, match="another pool"):
        search_index(built, other, QUERIES, K)
    with pytest.raises(UsageError, match="another pool or recipe"):
        build_index(other, RECIPE, built)
    with pytest.raises(UsageError, match="is for pool 'laion'"):
        build_index(pool, RECIPE.model_copy(update={"pool": "laion"}), tmp_path / "x")
    with pytest.raises(UsageError, match="no finished index"):
        search_index(tmp_path, pool, QUERIES, K)
    with pytest.raises(UsageError, match="'IVF' is no index of dimension 32"):
        build_index(pool, RECIPE.model_copy(update={"factory_string": "IVF"}), tmp_path / "y")
    with pytest.raises(UsageError, match="at least 100"):
        measure_recall(built, pool, QUERIES[:99], K)
    assert not (tmp_path / "y" / INDEX_SEAL).exists()


def test_recipes(tmp_path: Path) -> None:
    for path in RECIPES.glob("*.yaml"):
        assert load_recipe(path.stem).name == path.stem
        assert load_recipe(path.stem).recall, f"{path}: no measured recall"
    with pytest.raises(UsageError, match="did you mean 'pocket'"):
        load_recipe("poket")
    bad = tmp_path / "bad.yaml"
    bad.write_text("pool: x\nnprob: 3\n")
    with pytest.raises(UsageError, match=r"bad.yaml: model: Field required"):
        load_recipe(str(bad))
    bad.write_text("- a\n")
    with pytest.raises(UsageError, match="not a mapping"):
        load_recipe(str(bad))


def test_the_pocket_recipe_finds_what_it_says(tmp_path: Path) -> None:
    pool, recipe, clip = open_pool("pocket"), load_recipe("pocket"), load_clip("pocket")
    texts: set[str] = set()
    for name in ("digits", "textures", "aircraft"):
        task = load_task(name)
        words = [word for known in task.class_names for word in (known, *task.synonyms.get(known, ()))]
        texts |= {template.replace("{}", word) for word in words for template in task.templates}
    (recorded,) = recipe.recall
    assert len(texts) == recorded.queries
    xq = text_features(clip, sorted(texts))
    measured = measure_recall(build_index(pool, recipe, tmp_path), pool, xq, recorded.k)
    assert measured == pytest.approx(recorded.recall_at_k, abs=0.005)
