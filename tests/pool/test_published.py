"""Indexes as LAION published them, built here by FAISS's own calls, read in place and compared with exact search."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from clusters import DIM, RECIPE, clusters, write_pool
from faiss.contrib.ondisk import merge_ondisk

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pool import index, published
from retrieve_or_generate.pool.index import measure_recall, open_index, recorded_recall, search_index, self_found
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.pool.scan import scan

K, ROWS, PARTS = 10, 3000, 3
QUERIES = clusters(np.random.default_rng(2), 100)
FORMS = ["file", "folder", "inside", "parts"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return write_pool(tmp_path_factory.mktemp("pools") / "clusters", clusters(np.random.default_rng(1), ROWS), 1100)


def trained(pool: Pool) -> Any:
    empty = faiss.index_factory(DIM, "PCA16,IVF16_HNSW8,PQ4x4", faiss.METRIC_INNER_PRODUCT)
    empty.train(rows_of(pool)[:500])
    faiss.extract_index_ivf(empty).nprobe = 5
    return empty


def rows_of(pool: Pool) -> np.ndarray:
    return np.concatenate([pool.embeddings(shard, "image") for shard in pool.shards]).astype(np.float32)


@pytest.fixture(scope="module")
def places(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same vectors in every published form; `local` are parts that count their rows from nought each."""
    root, vectors = tmp_path_factory.mktemp("published"), rows_of(pool)
    faiss.write_index(trained(pool), str(root / "trained"))

    def write(path: Path, first: int, last: int, ids: np.ndarray) -> str:
        one = faiss.read_index(str(root / "trained"))
        one.add_with_ids(vectors[first:last], ids)
        path.parent.mkdir(exist_ok=True)
        faiss.write_index(one, str(path))
        return str(path)

    write(root / "knn.index", 0, ROWS, np.arange(ROWS))
    step, files = ROWS // PARTS, []
    for part in range(PARTS):
        rows = np.arange(part * step, (part + 1) * step)
        files.append(write(root / f"parts/knn.index{part:02d}", rows[0], rows[-1] + 1, rows))
        write(root / f"local/{part:02d}.index", rows[0], rows[-1] + 1, np.arange(step))
    folder = root / "index/image.index"
    folder.mkdir(parents=True)
    merged = faiss.read_index(str(root / "trained"))
    merge_ondisk(merged, files, str(folder / "merged_index.ivfdata"))
    faiss.write_index(merged, str(folder / "populated.index"))
    return {
        "file": root / "knn.index",
        "folder": folder,
        "inside": root / "index",
        "parts": root / "parts",
        "local": root / "local",
        "trained": root / "trained",
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_in_place_and_scored_exactly(form: str, pool: Pool, places: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in places[form].rglob("*")}
    opened = open_index(places[form], pool)
    assert (opened.built, opened.recipe.nprobe, opened.recipe.modality) == (False, 5, "image")
    D, I = search_index(opened, pool, QUERIES, K, nprobe=16, overfetch=300)  # noqa: E741
    true_D, true_I = scan(QUERIES, (pool.embeddings(shard, "image") for shard in pool.shards), K)
    np.testing.assert_array_equal(I, true_I)
    np.testing.assert_array_equal(D, true_D)
    mask = np.arange(ROWS) % 7 == 0
    _, found = search_index(opened, pool, QUERIES, K, allowed=mask, nprobe=16)
    assert (found % 7 == 0).all()
    assert self_found(opened, pool) > 0.5
    assert before == {path: path.stat().st_mtime_ns for path in places[form].rglob("*")}


def test_the_forms_give_the_same_answers(pool: Pool, places: dict[str, Path]) -> None:
    answers = [search_index(places[form], pool, QUERIES, K) for form in FORMS]
    for D, I in answers[1:]:  # noqa: E741
        np.testing.assert_array_equal(I, answers[0][1])
        np.testing.assert_array_equal(D, answers[0][0])


def test_its_recall_is_kept_apart_from_it(pool: Pool, places: dict[str, Path]) -> None:
    opened = open_index(places["folder"], pool, RECIPE)
    measured = measure_recall(opened, pool, QUERIES, K)
    assert recorded_recall(open_index(places["inside"], pool, RECIPE), pool, K) == measured
    assert recorded_recall(open_index(places["parts"], pool, RECIPE), pool, K) is None


def test_a_file_is_tried_once_in_a_process_of_its_own(
    pool: Pool, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_index(places["file"], pool)
    monkeypatch.setattr(published.subprocess, "run", lambda *_, **__: pytest.fail("tried already"))
    open_index(places["file"], pool)


def test_parts_that_do_not_fit(pool: Pool, places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"01\.index: its rows are numbered 0 to \d+ and not on from 1000; merge"):
        open_index(places["local"], pool)
    shutil.copytree(places["parts"], tmp_path / "gap")
    (tmp_path / "gap/knn.index01").unlink()
    with pytest.raises(IntegrityError, match=r"part 1 of the index is missing \(2 are there\)"):
        open_index(tmp_path / "gap", pool)


def test_what_is_of_another_pool(pool: Pool, places: dict[str, Path], tmp_path: Path) -> None:
    other = write_pool(tmp_path / "fewer", rows_of(pool)[:2999], 3000)
    with pytest.raises(UsageError, match=r"an index of 3000 rows, but .* has 2999; its answers would be other rows"):
        open_index(places["file"], other)
    with pytest.raises(UsageError, match="nothing: no finished index; give a folder"):
        open_index(tmp_path / "nothing", pool)
    shuffled = write_pool(tmp_path / "shuffled", rows_of(pool)[np.random.default_rng(0).permutation(ROWS)], 3000)
    assert self_found(open_index(places["file"], shuffled), shuffled) < 0.1


def test_an_index_by_another_measure_is_refused(pool: Pool, tmp_path: Path) -> None:
    """Of unit vectors, inner product and distance order rows alike; the largest difference does not."""
    index = faiss.IndexFlat(DIM, faiss.METRIC_Linf)
    index.add(rows_of(pool))
    faiss.write_index(index, str(tmp_path / "other.index"))
    with pytest.raises(UsageError, match=r"other.index: an index by neither inner product nor distance"):
        open_index(tmp_path / "other.index", pool)


def test_a_truncated_file_is_told_not_crashed_on(pool: Pool, places: dict[str, Path], tmp_path: Path) -> None:
    for name, source, cut in (
        ("knn.index", places["file"], 0.5),
        ("populated.index", places["folder"], 0.5),
        ("merged_index.ivfdata", places["folder"], 0.9),
    ):
        folder = tmp_path / f"cut-{name}"
        if source.is_dir():
            shutil.copytree(source, folder)
        else:
            folder.mkdir()
            shutil.copy(source, folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * cut)])
        place = folder / name if name == "knn.index" else folder
        with pytest.raises(IntegrityError, match=str(folder)):
            open_index(place, pool)


def test_a_process_that_dies_or_hangs_is_an_error(
    pool: Pool, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (places["file"],)
    monkeypatch.setattr(published.sys, "executable", "/bin/false")
    with pytest.raises(IntegrityError, match=r"knn\.index: cannot be read"):
        published.try_reading(files, "no-such-key")
    monkeypatch.undo()
    monkeypatch.setattr(published, "_TRIAL_SECONDS", 0.001)
    with pytest.raises(IntegrityError, match="does not finish reading it"):
        published.try_reading(files, "no-such-key")


def test_a_row_that_does_not_exist_is_not_looked_up(
    pool: Pool, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_index(places["file"], pool)
    beyond = faiss.read_index(str(places["trained"]))
    beyond.add_with_ids(rows_of(pool), np.arange(ROWS) + 5)
    monkeypatch.setattr(index, "_mapped", lambda *_: beyond)
    with pytest.raises(IntegrityError, match=r"found row 300\d, but .* has 3000"):
        search_index(opened, pool, QUERIES, K, nprobe=16, overfetch=300)


@pytest.mark.slow
def test_mutated_files_end_no_process_but_their_own(pool: Pool, places: dict[str, Path], tmp_path: Path) -> None:
    data, rng = places["file"].read_bytes(), np.random.default_rng(4)
    refused = 0
    for number in range(25):
        place = tmp_path / "knn.index"
        at = int(rng.integers(min(len(data) - 8, 8000)))  # where sizes and quantisers stand
        place.write_bytes(data[:at] + bytes(255 - byte for byte in data[at : at + 8]) + data[at + 8 :])
        try:
            published.try_reading((place,), f"mutant-{number}")
        except IntegrityError:
            refused += 1
    assert refused > 5
