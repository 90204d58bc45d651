"""FAISS indexes over a small pool on disk, against the exact scan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from clusters import RECIPE, clusters, write_pool

from retrieve_or_generate import api
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.models import load_clip, text_features
from retrieve_or_generate.pool import index
from retrieve_or_generate.pool.index import (
    INDEX,
    INDEX_SEAL,
    LISTS,
    RECIPES,
    Measured,
    Recall,
    build_index,
    load_recipe,
    measure_recall,
    open_index,
    packed,
    recorded_recall,
    search_index,
    self_found,
)
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.scan import scan
from retrieve_or_generate.tasks import load_task

K = 20


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
    recalls = [measure_recall(built, pool, QUERIES, K, nprobe).recall_at_k for nprobe in (1, 4, 32)]
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


def test_a_pool_with_few_captions_needs_lines_to_measure_recall_with(tmp_path: Path) -> None:
    few = write_pool(tmp_path / "few", QUERIES[:50])
    folder = build_index(
        few, RECIPE.model_copy(update={"factory_string": "Flat", "train_rows": 50}), tmp_path / "index"
    )
    with pytest.raises(
        UsageError, match=r"few: 50 captions are too few .* give 100 lines or more to rog index verify --texts"
    ):
        api.index_recall(folder, str(few.folder))


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
    with pytest.raises(UsageError, match="another recipe than 'test' as it is now"):
        open_index(built, pool, RECIPE.model_copy(update={"seed": 4}))
    assert open_index(built, pool, RECIPE.model_copy(update={"nprobe": 7})).recipe.nprobe == 7
    sealed = dataclasses.replace(pool, model="none")
    with pytest.raises(UsageError, match=r"is for pool 'laion', .* give a recipe file of your own that says pool: "):
        build_index(sealed, RECIPE.model_copy(update={"pool": "laion"}), tmp_path / "x")
    with pytest.raises(UsageError, match=r"is for 768-d embeddings, but those of .* have 32"):
        build_index(pool, RECIPE.model_copy(update={"dim": 768}), tmp_path / "x")
    with pytest.raises(UsageError, match="no text_emb/"):
        build_index(pool, RECIPE.model_copy(update={"modality": "text"}), tmp_path / "x")
    with pytest.raises(UsageError, match="no finished index"):
        search_index(tmp_path, pool, QUERIES, K)
    with pytest.raises(UsageError, match="'IVF' is no index of dimension 32"):
        build_index(pool, RECIPE.model_copy(update={"factory_string": "IVF"}), tmp_path / "y")
    with pytest.raises(UsageError, match="at least 100"):
        measure_recall(built, pool, QUERIES[:99], K)
    assert not (tmp_path / "y" / INDEX_SEAL).exists()


def test_rows_that_are_not_allowed_are_not_found(pool: Pool, built: Path) -> None:
    mask = np.random.default_rng(5).random(pool.rows) < 0.3
    masks = [mask[shard.first_row : shard.first_row + shard.rows] for shard in pool.shards]
    true_D, true_I = scan(QUERIES, (pool.embeddings(shard, "image") for shard in pool.shards), K, allowed=masks)
    for allowed in (mask, packed(pool, mask), lambda shard: masks[shard.index]):
        D, I = search_index(built, pool, QUERIES, K, nprobe=32, overfetch=60, allowed=allowed)  # noqa: E741
        np.testing.assert_array_equal(I, true_I)
        np.testing.assert_array_equal(D, true_D)
    half = search_index(
        built, pool, QUERIES, K, allowed=lambda shard: None if shard.index else np.zeros(shard.rows, bool)
    )
    assert (half[1][half[1] >= 0] >= pool.shards[1].first_row).all()
    with pytest.raises(ValueError, match="does not fit 3000 rows"):
        search_index(built, pool, QUERIES, K, allowed=mask[:-1])


@pytest.mark.parametrize("factory_string", ["Flat", "PCA16,IVF32_HNSW8,Flat", "HNSW16"])
def test_other_types_leave_rows_out_too(factory_string: str, pool: Pool, tmp_path: Path) -> None:
    folder = build_index(pool, RECIPE.model_copy(update={"factory_string": factory_string}), tmp_path)
    mask = np.arange(pool.rows) % 3 == 0
    _, found = search_index(folder, pool, QUERIES, K, allowed=mask, nprobe=32)
    assert (found[found >= 0] % 3 == 0).all()
    assert (found >= 0).mean() > 0.9


def test_a_type_that_cannot_leave_rows_out_says_so(pool: Pool, tmp_path: Path) -> None:
    folder = build_index(pool, RECIPE.model_copy(update={"factory_string": "PQ4x4"}), tmp_path)
    with pytest.raises(UsageError, match="cannot leave rows out of a IndexPQ"):
        search_index(folder, pool, QUERIES, K, allowed=np.ones(pool.rows, bool))


def test_many_queries_are_answered_in_batches(pool: Pool, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search_index(built, pool, QUERIES, K)
    monkeypatch.setattr(index, "_BATCH_BYTES", 7 * 2 * K * pool.dim * 4)
    batched = search_index(built, pool, QUERIES, K)
    np.testing.assert_array_equal(batched[0], whole[0])
    np.testing.assert_array_equal(batched[1], whole[1])


def test_measured_recall_stays_with_the_index(pool: Pool, tmp_path: Path) -> None:
    opened = open_index(build_index(pool, RECIPE, tmp_path), pool)
    assert recorded_recall(opened, pool, K) is None
    measured = measure_recall(opened, pool, QUERIES, K)
    assert (measured.k, measured.queries, measured.nprobe) == (K, 120, RECIPE.nprobe)
    measure_recall(opened, pool, QUERIES, K + 10, nprobe=9)
    again = open_index(tmp_path, pool)
    for k in (1, K):
        assert recorded_recall(again, pool, k) == measured
    assert recorded_recall(again, pool, K + 1) is None
    found = recorded_recall(again, pool, K, nprobe=9)
    assert found
    assert found.k == K + 10
    (tmp_path / "measured.json").write_text('{"index": 3}')
    with pytest.raises(IntegrityError, match="not a record of measured recall"):
        recorded_recall(again, pool, K)


def test_recall_that_the_recipe_records_counts(pool: Pool, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"recall": (Recall(k=50, queries=100, recall_at_k=0.9),)})
    opened = open_index(build_index(pool, recipe, tmp_path), pool)
    assert recorded_recall(opened, pool, 50) == Measured(k=50, queries=100, recall_at_k=0.9, nprobe=RECIPE.nprobe)
    assert recorded_recall(opened, pool, 50, nprobe=2) is None


def test_rows_find_themselves(pool: Pool, built: Path) -> None:
    assert self_found(open_index(built, pool), pool) > 0.9


@pytest.mark.parametrize("mutants", [50, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("factory_string", ["Flat", "IVF32,SQ8", "PCA16,IVF32,PQ8x4fs", "HNSW16"])
def test_no_damaged_index_is_searched(factory_string: str, mutants: int, pool: Pool, tmp_path: Path) -> None:
    folder = build_index(pool, RECIPE.model_copy(update={"factory_string": factory_string}), tmp_path)
    rng = np.random.default_rng(11)
    files = [path for path in (folder / INDEX, folder / LISTS) if path.exists()]
    for _ in range(mutants):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, rng))
        with pytest.raises(IntegrityError, match=path.name):
            open_index(folder, pool)
        path.write_bytes(whole)
    assert open_index(folder, pool).built


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Another byte, another integer, or a shorter file."""
    at, kind = int(rng.integers(len(data) - 8)), int(rng.integers(3))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes(255 - byte for byte in data[at : at + 8]) + data[at + 8 :]
    return data[:at]


def test_a_large_index_is_opened_by_samples_of_it(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_index(pool, RECIPE, tmp_path)
    monkeypatch.setattr(index, "_VERIFIED_BYTES", 0)
    assert open_index(folder, pool).built
    path = folder / LISTS
    whole = path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=LISTS):
            open_index(folder, pool)


def test_recall_is_never_of_more_rows_than_there_are(tmp_path: Path) -> None:
    few = write_pool(tmp_path / "few", QUERIES)
    recipe = RECIPE.model_copy(update={"factory_string": "IVF4,Flat", "nprobe": 2, "train_rows": 120})
    opened = open_index(build_index(few, recipe, tmp_path / "index"), few)
    measured = measure_recall(opened, few, QUERIES, 1000)
    assert measured.k == few.rows == 120
    assert measured.recall_at_k < 1
    assert recorded_recall(opened, few, 1000) == recorded_recall(opened, few, 120) == measured


def test_recipes(tmp_path: Path) -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == {"pocket", "laion2b-image", "laion2b-caption", "relaion2b", "datacomp1b"}
    for name in names:
        assert load_recipe(name).name == name
    assert load_recipe("laion2b-caption").factory_string == "OPQ256_768,IVF131072_HNSW32,PQ256x8"  # 2406.05184, D.1
    assert load_recipe("pocket").recall
    with pytest.raises(UsageError, match="did you mean 'pocket'"):
        load_recipe("poket")
    bad = tmp_path / "bad.yaml"
    bad.write_text("pool: x\nnprob: 3\n")
    with pytest.raises(UsageError, match=r"bad.yaml: model: field required"):
        load_recipe(str(bad))
    bad.write_text("- a\n")
    with pytest.raises(UsageError, match="an index recipe is a mapping of keys to values"):
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
    assert measured.recall_at_k == pytest.approx(recorded.recall_at_k, abs=0.005)
