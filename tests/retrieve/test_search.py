"""The search as a stage: several tasks at once, gone on with after a kill, filtered, by the planner's choice, or by a service."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import CAPTIONS, CLIP, QUERIES, ROWS, TASK, Wordless, text_features, write_pool
from test_remote import Service, serving

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pixels import encode_png
from retrieve_or_generate.pool import planner
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.progress import Bytes
from retrieve_or_generate.retrieve import _engine_before, engines, search
from retrieve_or_generate.retrieve import queries as queries_module
from retrieve_or_generate.retrieve.queries import class_queries
from retrieve_or_generate.retrieve.search import Found, open_search, read_found, run_search
from retrieve_or_generate.retrieve.semantic import answered_candidates, best_queries
from retrieve_or_generate.settings import DownloadSettings, RetrieveSettings, RowSettings
from retrieve_or_generate.tasks.base import Split
from retrieve_or_generate.tasks.templates import templates_for

BOTH = RetrieveSettings(strategy="both", modalities=("image", "text"), k=10, fetch="http")
OTHER = Wordless("insects", ("bee", "plant"), ("{}",), Path("nowhere"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return write_pool(tmp_path_factory.mktemp("pools") / "handmade")


@pytest.fixture(autouse=True)
def _features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_module, "text_features", text_features)


def found(pool: Pool, settings: RetrieveSettings, folder: Path) -> Found:
    asked = open_search(pool, CLIP, settings, [TASK])
    run_search(asked, {folder: TASK}, folder)
    there = read_found(asked, TASK, folder)
    assert there is not None
    return there


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_tasks_searched_for_together_find_what_each_finds_alone(pool: Pool, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    together = open_search(pool, CLIP, BOTH, [TASK, OTHER])
    folders = {tmp_path / "both/birds": TASK, tmp_path / "both/insects": OTHER}
    run_search(together, folders, tmp_path / "both", lambda *how: told.append(how))
    for task in (TASK, OTHER):
        alone = open_search(pool, CLIP, BOTH, [task])
        run_search(alone, {tmp_path / task.name: task}, tmp_path / task.name)
        assert files(tmp_path / "both" / task.name) == files(tmp_path / task.name)
    scanned = [how for how in told if how[0] == "scanning handmade"]
    assert scanned[-1][1:] == (2 * ROWS * 16 * 2,) * 2, "image and text embeddings once, for both tasks"
    assert isinstance(scanned[-1][1], Bytes)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["birds", "insects"]


def test_a_finished_half_is_not_searched_for_again(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = found(pool, BOTH, tmp_path / "whole")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "match_pool", killed)
        with pytest.raises(KeyboardInterrupt):
            found(pool, BOTH, tmp_path / "part")
    with monkeypatch.context() as patch:
        patch.setattr(search, "scan_neighbours", killed)
        again = found(pool, BOTH, tmp_path / "part")
    assert again == whole
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_a_changed_byte_of_what_was_found_is_named(pool: Pool, tmp_path: Path) -> None:
    found(pool, BOTH, tmp_path)
    path = tmp_path / "neighbours.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"neighbours\.parquet: its bytes changed"):
        found(pool, BOTH, tmp_path)


def test_more_neighbours_than_rows_are_all_rows_and_take_no_more_memory(pool: Pool, tmp_path: Path) -> None:
    rows = found(pool, BOTH.model_copy(update={"strategy": "semantic", "k": 10**12}), tmp_path).neighbours
    assert rows is not None
    assert rows.num_rows == len(TASK.class_names) * ROWS


def test_rows_that_are_left_out_are_found_by_neither_half_and_counted(pool: Pool, tmp_path: Path) -> None:
    block = tmp_path / "block.txt"
    block.write_text("http://x/7\n")
    rows = RowSettings(punsafe_below=0.5, block=(str(block),))
    there = found(pool, BOTH.model_copy(update={"rows": rows}), tmp_path / "search")
    assert there.neighbours is not None
    assert there.captions is not None
    everywhere = set(there.neighbours["row"].to_pylist()) | set(there.captions["row"].to_pylist())
    assert max(everywhere) < ROWS // 2
    assert 7 not in everywhere
    assert CAPTIONS[57]
    assert 57 in everywhere
    counted = {"blocked": 1, "unsafe": ROWS // 2}
    assert there.facts["neighbours"]["excluded"] == there.facts["captions"]["excluded"] == counted


@pytest.mark.parametrize("strategy", ["semantic", "substring"])
def test_where_no_row_is_left_there_is_no_search(pool: Pool, tmp_path: Path, strategy: str) -> None:
    settings = BOTH.model_copy(update={"rows": RowSettings(punsafe_below=0), "strategy": strategy})
    with pytest.raises(UsageError, match=rf"leaves out all of its {ROWS} rows \({ROWS} unsafe\)"):
        found(pool, settings, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".parquet"]


@pytest.mark.parametrize("column", [None, "url", "URL"])
def test_a_pool_without_urls_is_not_downloaded_from(tmp_path: Path, column: str | None) -> None:
    pool = write_pool(tmp_path / "pool")
    for shard in pool.shards:
        table = pq.read_table(shard.metadata).drop_columns("URL")
        if column:
            table = table.append_column(column, pa.nulls(shard.rows, pa.string()))
        pq.write_table(table, shard.metadata)
    with pytest.raises(UsageError, match=r"pool: its metadata tells no URL .*retrieve.fetch=shards"):
        open_search(pool, CLIP, BOTH, [TASK])
    last = pool.shards[-1].metadata
    pq.write_table(pq.read_table(last).append_column("Url", pa.array(["http://x/1"] * pool.shards[-1].rows)), last)
    if column is None:
        open_search(pool, CLIP, BOTH, [TASK])


def test_lists_count_by_what_they_hold_not_by_where_they_lie(pool: Pool, tmp_path: Path) -> None:
    keys = []
    for name, text in (("a", "http://x/7\n"), ("b", "http://x/7\n"), ("c", "http://x/8\n")):
        (tmp_path / name).write_text(text)
        settings = BOTH.model_copy(update={"rows": RowSettings(block=(str(tmp_path / name),))})
        keys.append(open_search(pool, CLIP, settings, [TASK]).key(TASK, "neighbours"))
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(UsageError, match=r"gone\.txt"):
        open_search(pool, CLIP, BOTH.model_copy(update={"rows": RowSettings(block=("gone.txt",))}), [TASK]).key(
            TASK, "neighbours"
        )


def test_what_a_search_will_need_is_looked_at_before_it_begins(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("no entry\n")
    for path, message in ((tmp_path / "gone.txt", "no such file"), (tmp_path / "list.txt", "line 1: .* neither a URL")):
        download = DownloadSettings(blocklist=str(path))
        with pytest.raises(UsageError, match=message):
            open_search(pool, CLIP, BOTH.model_copy(update={"download": download}), [TASK])
    last = dataclasses.replace(pool.shards[-1], text_embeddings=None)
    half = dataclasses.replace(pool, shards=(*pool.shards[:-1], last))
    with pytest.raises(UsageError, match="no text_emb/"):
        open_search(half, CLIP, BOTH, [TASK])


def test_the_planner_chooses_and_its_choice_is_kept(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"{{pool: {pool.name}, model: unknown, modality: text, factory_string: 'IVF4,Flat', nprobe: 4, train_rows: 200}}"
    )
    settings = RetrieveSettings(k=25, engine="auto", index=str(recipe), fetch="http")
    first = open_search(pool, CLIP, settings, [TASK], index_folder=tmp_path / "index")
    assert first.engine.name == "scan"
    assert "no index of recipe 'mine' is built" in first.engine.why
    by_index = settings.model_copy(update={"engine": "index"})
    asked = open_search(pool, CLIP, by_index, [TASK], index_folder=tmp_path / "index")
    run_search(asked, {tmp_path / "found": TASK}, tmp_path / "found")
    told = read_found(asked, TASK, tmp_path / "found")
    assert told is not None
    assert told.facts["neighbours"]["recall"]["recall_at_k"] == 1.0
    assert told.facts["neighbours"]["recall"]["queries"] >= 100
    faster = planner.Plan("index", "it is faster", 1.0, 0.1, 0, None)
    monkeypatch.setattr(planner, "plan", lambda *_, **__: faster)
    second = open_search(pool, CLIP, settings, [TASK], index_folder=tmp_path / "index")
    assert (second.engine.name, second.engine.why) == ("index", "it is faster")
    assert second.key(TASK, "neighbours") == asked.key(TASK, "neighbours")
    begun = _engine_before(tmp_path / "set", tmp_path / "found", settings)
    assert begun is not None
    assert (begun.name, begun.identity) == ("index", asked.engine.identity)
    assert _engine_before(tmp_path / "set", tmp_path / "found", by_index) is None
    two = open_search(pool, CLIP, settings.model_copy(update={"modalities": ("image", "text")}), [TASK])
    assert two.engine.name == "scan"


def test_a_service_searches_in_our_place(tmp_path: Path) -> None:
    service = Service()
    clip: Any = SimpleNamespace(name="small", embed_dim=4, fingerprint="89", device="cpu")
    with pytest.MonkeyPatch.context() as patch, serving(service) as url:
        patch.setattr(queries_module, "text_features", lambda clip, texts: np.resize(QUERIES, (len(texts), 4)))
        settings = RetrieveSettings(engine="remote", service=url, k=3, fetch="http", modalities=("image",))  # type: ignore[arg-type]
        asked = open_search(None, clip, settings, [TASK])
        run_search(asked, {tmp_path: TASK}, tmp_path)
    there = read_found(asked, TASK, tmp_path)
    assert there is not None
    candidates = answered_candidates(there, settings.model_copy(update={"candidates_per_class": 1})).to_pylist()
    assert [row["row"] for row in candidates] == sorted({row["row"] for row in candidates})
    assert all(row["url"] == f"http://pets/{row['row']}.jpg" for row in candidates)
    assert {row["caption"] for row in candidates} == {f"pet {row['row']}" for row in candidates}
    assert {question["deduplicate"] for question in service.asked} == {False}
    assert len(service.asked) == 9
    assert there.facts["neighbours"] == {"engine": "remote", "exact": False, "recall": None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategy": "both"}, "needs retrieve.strategy=semantic"),
        ({"fetch": "shards"}, "needs retrieve.fetch=http"),
        ({"examples_per_class": 1}, "needs retrieve.examples_per_class=0"),
        ({"rows": RowSettings(least_side=9)}, "does not say what retrieve.rows would filter by"),
        ({"modalities": ("image", "text")}, "ask for one of retrieve.modalities"),
    ],
)
def test_what_a_service_cannot_do_is_said(changed: dict[str, Any], message: str) -> None:
    settings = RetrieveSettings(engine="remote", service="http://127.0.0.1:1", fetch="http")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        open_search(None, CLIP, settings.model_copy(update=changed), [TASK])


def test_templates_of_the_settings_come_before_the_tasks() -> None:
    assert templates_for(TASK, None) == TASK.templates
    assert templates_for(TASK, ("the {}",)) == ("the {}",)
    imagenet = templates_for(TASK, "imagenet")
    assert len(set(imagenet)) == 80
    assert all(template.count("{}") == 1 for template in imagenet)


def test_example_images_are_queries_and_count_as_much_as_templates(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = np.roll(QUERIES, 1, axis=0)

    class Pictured(Wordless):
        def split(self, name: str) -> Split:
            return Split(tuple("abcde"), (encode_png(np.zeros((8, 8, 3), np.uint8)),) * 5, np.array([0, 1, 2, 0, 0]))

    task = Pictured("pictured", TASK.class_names, TASK.templates, Path("nowhere"))
    clip: Any = SimpleNamespace(**vars(CLIP), image_size=8)
    monkeypatch.setattr(queries_module, "image_features", lambda clip, pixels: shown[: len(pixels)])
    settings = RetrieveSettings(k=5, examples_per_class=2, fetch="http")
    queries = class_queries(task, clip, settings)
    assert [kind.shape for kind in queries.kinds] == [(3, 3), (3, 2)]
    examples = queries.kinds[1]
    assert examples[1][0] == examples[1][1], "its only picture"
    named = [{queries.texts[place].removeprefix("training image ") for place in places} for places in examples]
    assert named[0] < set("ade")
    assert named[1:] == [{"b"}, {"c"}]
    assert queries.few_examples == dict.fromkeys(TASK.class_names[1:], 1)
    assert class_queries(task, clip, settings.model_copy(update={"examples_per_class": 1})).few_examples == {}
    asked = open_search(pool, clip, settings, [task])
    run_search(asked, {tmp_path: task}, tmp_path)
    rows = np.array([3, 60, 200])
    scores, best = best_queries(pool, queries, rows, np.array([0, 1, 2]), ("text",))
    stored = np.concatenate([pool.embeddings(shard, "text") for shard in pool.shards])[rows].astype(np.float64)
    exact = stored @ queries.features.astype(np.float64).T
    for place, label in enumerate((0, 1, 2)):
        by_kind = [exact[place, kind[label]] for kind in queries.kinds]
        assert scores[place] == pytest.approx(np.mean([values.max() for values in by_kind]), abs=1e-6)
        assert queries.told(best[place]).count(" + training image ") == 1
    with pytest.raises(UsageError, match=r"no training image of class 'dog'.*examples_per_class=0"):
        class_queries(Pictured("more", (*TASK.class_names, "dog"), TASK.templates, Path("nowhere")), clip, settings)


def test_an_index_of_a_folder_is_searched_where_it_lies(pool: Pool, tmp_path: Path) -> None:
    assert not engines._is_there(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no finished index"):
        open_search(pool, CLIP, RetrieveSettings(engine="index", index=str(tmp_path), fetch="http"), [TASK])
