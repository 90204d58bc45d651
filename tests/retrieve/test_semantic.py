"""Candidates by meaning and by name, from a pool whose embeddings are made by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from handmade import CAPTIONS, CLIP, DIM, EMBEDDINGS, QUERIES, ROWS, TASK, text_features, write_pool

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.retrieve import queries as queries_module
from retrieve_or_generate.retrieve.queries import class_queries
from retrieve_or_generate.retrieve.search import open_search, read_found, run_search
from retrieve_or_generate.retrieve.semantic import find_candidates
from retrieve_or_generate.settings import RetrieveSettings


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return write_pool(tmp_path_factory.mktemp("pools") / "handmade")


@pytest.fixture(autouse=True)
def _features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_module, "text_features", text_features)


def searched(pool: Pool, settings: RetrieveSettings, folder: Path, index_folder: Path | None = None) -> pa.Table:
    settings = settings.model_copy(update={"fetch": "http"})  # the pool has no pictures
    search = open_search(pool, CLIP, settings, [TASK], index_folder=index_folder)
    run_search(search, {folder: TASK}, folder)
    found = read_found(search, TASK, folder)
    assert found is not None
    return find_candidates(TASK, pool, class_queries(TASK, CLIP, settings), found, settings)


def scores(modalities: tuple[str, ...]) -> np.ndarray:
    """(rows, queries) mean cosine, in float64 from the stored halves."""
    return np.mean(
        [EMBEDDINGS[m].astype(np.float16).astype(np.float64) @ QUERIES.astype(np.float64).T for m in modalities], axis=0
    )


def by_row(found: pa.Table) -> dict[int, tuple[int, str]]:
    return {row["row"]: (row["label"], row["query"]) for row in found.to_pylist()}


@pytest.mark.parametrize("modalities", [("text",), ("image",), ("image", "text")])
def test_each_row_goes_to_its_best_class_among_those_that_found_it(
    modalities: tuple[Any, ...], pool: Pool, tmp_path: Path
) -> None:
    k = 20
    found = searched(pool, RetrieveSettings(k=k, modalities=modalities), tmp_path / "1")
    expected: dict[int, set[int]] = {}
    for modality in modalities:
        nearest = np.argsort(-scores((modality,)), axis=0)[:k]
        for query in range(9):
            for row in nearest[:, query]:
                expected.setdefault(int(row), set()).add(query // 3)
    mean = scores(modalities)
    best = {
        row: max(labels, key=lambda label: mean[row, 3 * label : 3 * label + 3].max())
        for row, labels in expected.items()
    }
    texts = [template.replace("{}", name) for name in TASK.class_names for template in TASK.templates]
    told = {
        row: (label, texts[3 * label + int(mean[row, 3 * label : 3 * label + 3].argmax())])
        for row, label in best.items()
    }
    assert by_row(found) == told
    assert found["row"].to_pylist() == sorted(told)
    np.testing.assert_allclose(
        found["score"], [mean[r, 3 * told[r][0] : 3 * told[r][0] + 3].max() for r in sorted(told)], rtol=1e-6
    )


def test_captions_name_rows_wherever_they_lie(pool: Pool, tmp_path: Path) -> None:
    found = by_row(searched(pool, RetrieveSettings(strategy="substring"), tmp_path / "2"))
    assert set(found) == {row for row, caption in enumerate(CAPTIONS) if caption}
    assert {query for _, query in found.values()} <= {"ant", "bee"}
    both = scores(("text",))[:, :6].reshape(ROWS, 2, 3).max(2).argmax(1)
    assert all(label == both[row] for row, (label, _) in found.items() if row % 50 == 7)
    words = searched(pool, RetrieveSettings(strategy="substring", caption_semantics="word"), tmp_path / "3")
    assert set(by_row(words)) == set(range(7, ROWS, 50))


def test_both_is_the_union_and_tells_the_query_that_found_a_row(pool: Pool, tmp_path: Path) -> None:
    semantically = by_row(searched(pool, RetrieveSettings(k=15), tmp_path / "4"))
    named = by_row(searched(pool, RetrieveSettings(strategy="substring"), tmp_path / "5"))
    both = by_row(searched(pool, RetrieveSettings(strategy="both", k=15), tmp_path / "6"))
    assert set(both) == set(semantically) | set(named)
    assert all(both[row] == found for row, found in named.items() if row not in semantically)


def test_candidates_per_class_are_the_best_scored(pool: Pool, tmp_path: Path) -> None:
    everything = searched(pool, RetrieveSettings(k=ROWS, candidates_per_class=ROWS), tmp_path / "7").to_pandas()
    few = searched(pool, RetrieveSettings(k=ROWS, candidates_per_class=5), tmp_path / "8").to_pandas()
    assert len(everything) == ROWS, "every row is of exactly one class"
    best = everything.sort_values(["label", "score"], ascending=[True, False]).groupby("label").head(5)
    assert sorted(best["row"]) == few["row"].tolist()


def test_an_index_with_every_list_probed_finds_what_the_scan_finds(pool: Pool, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"{{pool: {pool.name}, model: unknown, modality: text, factory_string: 'IVF4,Flat', nprobe: 4, train_rows: 200}}"
    )
    settings = RetrieveSettings(k=25, engine="index", index=str(recipe))
    found = searched(pool, settings, tmp_path / "a", tmp_path / "index")
    assert found.equals(searched(pool, RetrieveSettings(k=25), tmp_path / "9"))
    assert (tmp_path / "index/index.json").is_file()
    with pytest.raises(UsageError, match="over text embeddings"):
        open_search(pool, CLIP, settings.model_copy(update={"modalities": ("image",), "fetch": "http"}), [TASK])


def test_what_cannot_be_searched_is_told_before_anything_is_written(pool: Pool, tmp_path: Path) -> None:
    other: Any = SimpleNamespace(name="other", embed_dim=DIM + 1)
    with pytest.raises(UsageError, match="search a pool with the model that embedded it"):
        open_search(pool, other, RetrieveSettings(), [TASK])
    with pytest.raises(UsageError, match=r"set retrieve\.fetch=http"):
        open_search(pool, CLIP, RetrieveSettings(), [TASK])
    with pytest.raises(UsageError, match="did you mean 'pocket'"):
        open_search(pool, CLIP, RetrieveSettings(fetch="http", engine="index", index="pokcet"), [TASK])
    open_search(pool, CLIP, RetrieveSettings(fetch="http"), [TASK])
