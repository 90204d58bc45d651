"""Building: what it takes is said beforehand, a killed build ends with the same bytes, clip-retrieval's own calls read it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from clusters import DIM, RECIPE, clusters, write_pool

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool import build, footprint
from retrieve_or_generate.pool.build import build_index, train
from retrieve_or_generate.pool.faiss_files import INDEX, LISTS
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.pool.recipe import IndexRecipe, load_recipe

KINDS = ["PCA16,IVF16_HNSW8,SQ8", "IVF32,SQ8", "HNSW16"]


class _KilledError(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return write_pool(tmp_path_factory.mktemp("pools") / "clusters", clusters(np.random.default_rng(1), 2000), 700)


def recipe(factory_string: str) -> IndexRecipe:
    return RECIPE.model_copy(update={"factory_string": factory_string})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("factory_string", KINDS)
def test_killed_after_any_file_it_goes_on_and_ends_the_same(
    factory_string: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(build_index(pool, recipe(factory_string), tmp_path / "whole"))
    replace, kills = Path.replace, 0
    for last in range(1, 100):
        done = []

        def kill_at_last(self: Path, target: Path, last: int = last, done: list[Path] = done) -> None:
            if len(done) == last:
                raise _KilledError
            done.append(target)
            replace(self, target)

        monkeypatch.setattr(Path, "replace", kill_at_last)
        out = tmp_path / f"killed-{last}"
        try:
            build_index(pool, recipe(factory_string), out)
        except _KilledError:
            kills += 1
        monkeypatch.setattr(Path, "replace", replace)
        assert contents(build_index(pool, recipe(factory_string), out)) == whole
        assert not (out / "parts").exists()
        if len(done) < last:
            break
    assert kills == (10 if "IVF" in factory_string else 3)


def test_what_was_done_is_not_done_again(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "merge_lists", lambda *_: (_ for _ in ()).throw(_KilledError()))
    with pytest.raises(_KilledError):
        build_index(pool, RECIPE, tmp_path)
    monkeypatch.undo()
    for name in ("train", "_add"):
        monkeypatch.setattr(build, name, lambda *_: pytest.fail("done already"))
    told: list[tuple[int, int]] = []
    build_index(pool, RECIPE, tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(700, 2000), (1400, 2000), (2000, 2000)]


def test_a_part_of_another_build_is_made_anew(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "merge_lists", lambda *_: (_ for _ in ()).throw(_KilledError()))
    with pytest.raises(_KilledError):
        build_index(pool, RECIPE.model_copy(update={"seed": 9}), tmp_path / "out")
    monkeypatch.undo()
    whole = contents(build_index(pool, RECIPE, tmp_path / "whole"))
    assert contents(build_index(pool, RECIPE, tmp_path / "out")) == whole


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "clusters", clusters(np.random.default_rng(1), 60_000), 6000)
    wanted = RECIPE.model_copy(update={"factory_string": "PCA16,IVF64_HNSW16,SQ8", "train_rows": 8000})
    whole = contents(build_index(pool, wanted, tmp_path / "whole"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(wanted.model_dump(exclude={"name"}, mode="json")))
    code = (
        "import sys; from pathlib import Path; from retrieve_or_generate.pool.layout import open_pool\n"
        "from retrieve_or_generate.pool.build import build_index; from retrieve_or_generate.pool.recipe import load_recipe\n"
        "pool = open_pool(sys.argv[1]); recipe = load_recipe(sys.argv[2]).model_copy(update={'name': 'test'})\n"
        "print('ready', flush=True); build_index(pool, recipe, Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(pool.folder), str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[2])}
    for attempt in range(40):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(0.15 * (attempt + 1))
            process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            break
    assert attempt > 2
    assert contents(tmp_path / "out") == whole


def test_a_large_shard_is_added_in_parts(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(build_index(pool, RECIPE, tmp_path / "whole"))
    monkeypatch.setattr(build, "PART_ROWS", 150)
    monkeypatch.setattr(build, "ADD_ROWS", 64)
    assert len(build._spans(pool)) == 5 + 5 + 4
    assert contents(build_index(pool, RECIPE, tmp_path / "parts")) == whole


def test_threads_change_no_byte(pool: Pool, tmp_path: Path) -> None:
    faiss.omp_set_num_threads(2)
    try:
        both = contents(build_index(pool, recipe("IVF16_HNSW8,SQ8"), tmp_path / "both"))
    finally:
        faiss.omp_set_num_threads(1)
    assert both == contents(build_index(pool, recipe("IVF16_HNSW8,SQ8"), tmp_path / "one"))


def test_the_files_are_what_clip_retrieval_reads(pool: Pool, tmp_path: Path) -> None:
    folder = build_index(pool, RECIPE, tmp_path / "built")
    moved = folder.rename(tmp_path / "image.index")  # as its service names the folder
    index = faiss.read_index(str(moved / INDEX), faiss.IO_FLAG_ONDISK_SAME_DIR)
    assert (index.ntotal, index.nprobe) == (pool.rows, RECIPE.nprobe)
    xq = clusters(np.random.default_rng(3), 5)
    index.nprobe = 32
    vectors = np.concatenate([pool.embeddings(shard, "image") for shard in pool.shards]).astype(np.float32)
    assert (index.search(xq, 1)[1][:, 0] == (xq @ vectors.T).argmax(1)).mean() >= 0.8


def test_the_sample_is_spread_over_the_pool(pool: Pool) -> None:
    sample = build._sample(pool, RECIPE.model_copy(update={"train_rows": 500}))
    vectors = np.concatenate([pool.embeddings(shard, "image") for shard in pool.shards]).astype(np.float32)
    rows = (sample[:, None] == vectors[None]).all(2).argmax(1)
    assert ((rows >= np.arange(500) * 4) & (rows < np.arange(500) * 4 + 4)).all()
    np.testing.assert_array_equal(vectors[rows], sample)


@pytest.mark.parametrize(
    "factory_string",
    ["PCA16,IVF16_HNSW8,PQ4x4", "IVF32,SQ8", "IVF32,Flat", "HNSW16", "Flat", "PCA16,Flat", "PCA16,IVF32,PQ8x4fs"],
)
def test_the_stated_size_is_the_size(factory_string: str, pool: Pool, tmp_path: Path) -> None:
    stated = footprint.pool_footprint(recipe(factory_string), pool)
    folder = build_index(pool, recipe(factory_string), tmp_path)
    lists = (folder / LISTS).stat().st_size if stated.on_disk else 0
    held = (folder / INDEX).stat().st_size
    assert stated.index_bytes == pytest.approx(lists + held, rel=0.25)
    assert stated.search_bytes == pytest.approx(held, abs=6000, rel=0.2)
    assert stated.on_disk == (folder / LISTS).exists()


def test_sizes_of_the_papers_index() -> None:
    stated = footprint.footprint(load_recipe("laion2b-caption"), 2_130_000_000, 768)
    assert stated.index_bytes / 1e9 == pytest.approx(2.13 * 264, rel=0.01)  # 256 bytes of code, 8 of id
    assert stated.train_bytes / 2**30 == pytest.approx(2 * 8388608 * 768 * 4 / 2**30, rel=0.02)
    assert stated.add_bytes < 2 * 2**30
    assert stated.search_bytes < 2**30
    assert "memory 48.4 GiB to build (48.4 GiB to train, 1.2 GiB to add)" in str(stated)


def test_more_than_the_machine_has_is_refused(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "memory_bytes", lambda: 150_000)
    with pytest.raises(
        UsageError, match=r"training takes 0\.\d MiB of memory and this machine has 0\.1 MiB; lower train_rows"
    ):
        build_index(pool, recipe("IVF32,PQ4x4").model_copy(update={"train_rows": 2000}), tmp_path / "out")
    with pytest.raises(UsageError, match=r"adding takes .* choose an IVF"):
        build_index(pool, recipe("Flat"), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"of disk and 0.0 MiB are free; choose another --out"):
        build_index(pool, RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pool_too_small_for_its_lists_is_told(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is trained on 4,096 rows at least, and gets 1,500 of .* \(2,000 rows\)"):
        build_index(pool, recipe("IVF4096,SQ8"), tmp_path)
    with pytest.raises(UsageError, match="is trained on 256 rows at least, and gets 100"):
        build_index(pool, recipe("IVF16,PQ8").model_copy(update={"train_rows": 100}), tmp_path)
    with pytest.raises(UsageError, match="size is not known beforehand"):
        build_index(pool, recipe("NSG8"), tmp_path)


@pytest.mark.gpu
def test_centroids_from_a_gpu_serve_as_well() -> None:
    assert faiss.get_num_gpus()
    vectors = clusters(np.random.default_rng(1), 20_000)
    index = faiss.index_factory(DIM, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    train(index, vectors, RECIPE)
    plain = faiss.index_factory(DIM, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    plain.train(vectors)
    errors = []
    for one in (index, plain):
        centroids = one.quantizer.reconstruct_n(0, 64)
        errors.append(float((vectors @ centroids.T).max(1).mean()))
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
