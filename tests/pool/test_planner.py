"""Which engine is taken, and why: on rates that are given, and on those of this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clusters import RECIPE, clusters, write_pool

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.pool import planner
from retrieve_or_generate.pool.index import build_index, measure_recall, open_index, recorded_recall
from retrieve_or_generate.pool.layout import Pool
from retrieve_or_generate.pool.planner import Rates, known_recall, measure_rates, plan, scan_time

K = 10
QUERIES = clusters(np.random.default_rng(2), 100)
DISK = Rates(read_bytes=1e3, rows=1e9, products=1e12, pairs=1e9)  # a pass of the test's pool takes 192 s
FAST = Rates(read_bytes=1e12, rows=1e12, products=1e15, pairs=1e12)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return write_pool(tmp_path_factory.mktemp("pools") / "clusters", clusters(np.random.default_rng(1), 3000))


@pytest.fixture
def folder(pool: Pool, tmp_path: Path) -> Path:
    return build_index(pool, RECIPE, tmp_path / "index")


def test_without_an_index_it_scans(pool: Pool) -> None:
    made = plan(pool, 1, K, None, rates=DISK)
    assert (made.engine, made.index_seconds, made.recall) == ("scan", None, None)
    assert made.scan_seconds == pytest.approx(192, rel=0.01)
    assert made.why == "one exact pass over 3,000 rows takes about 3 min 12 s; no index was asked for"
    assert plan(pool, 1, K, RECIPE, rates=DISK).why.endswith("no index of recipe 'test' is built")


def test_an_unmeasured_or_poor_index_is_not_taken(pool: Pool, folder: Path) -> None:
    made = plan(pool, 1, K, RECIPE, folder=folder, rates=DISK)
    assert made.engine == "scan"
    assert "recall of the index is not measured at this k" in made.why
    opened = open_index(folder, pool)
    measure_recall(opened, pool, QUERIES, 300, nprobe=1)
    made = plan(pool, 1, 300, opened, rates=DISK, nprobe=1)
    assert made.engine == "scan"
    assert "the index finds only" in made.why
    assert made.recall


def test_a_good_index_is_taken_where_it_is_faster(pool: Pool, folder: Path) -> None:
    opened = open_index(folder, pool)
    recall = measure_recall(opened, pool, QUERIES, K, nprobe=32)
    made = plan(pool, 1, K, opened, rates=DISK, nprobe=32)
    assert made.engine == "index"
    assert made.recall == recall
    assert made.why.startswith("the index takes less than a second and finds ")
    assert made.index_seconds
    assert made.index_seconds < made.scan_seconds
    made = plan(pool, 1, K, opened, rates=FAST, nprobe=32)
    assert made.engine == "scan"
    assert "the index takes" in made.why


def test_a_scan_costs_one_pass_until_products_cost_more(pool: Pool) -> None:
    rates = Rates(read_bytes=pool.rows * pool.dim * 2, rows=1e12, products=pool.rows * 100, pairs=1e12)
    assert scan_time(pool, 1, K, rates) == pytest.approx(1, rel=1e-3)
    assert scan_time(pool, 100, K, rates) == pytest.approx(1, rel=1e-2)
    assert scan_time(pool, 1001, K, rates) == pytest.approx(10, rel=1e-2)


def test_answers_that_do_not_fit_the_memory_are_refused(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "memory_bytes", lambda: 2**20)
    with pytest.raises(
        UsageError, match="10000 queries with k=100 have 0 GiB of answers, more than this machine's memory"
    ):
        plan(pool, 10_000, 100, None, rates=DISK)


def test_recall_is_recorded_or_measured_or_refused(pool: Pool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_index(folder, pool)
    monkeypatch.setattr(planner, "measure_rates", lambda *_: DISK)
    with pytest.raises(UsageError, match=r"nobody has measured .* rog index verify .* -k 10"):
        known_recall(opened, pool, K, lambda: pytest.fail("not asked for"))
    monkeypatch.setattr(planner, "measure_rates", lambda *_: FAST)
    measured = known_recall(opened, pool, K, lambda: QUERIES)
    assert measured == recorded_recall(opened, pool, K)
    assert known_recall(opened, pool, K, lambda: pytest.fail("known already")) == measured


def test_rates_of_this_machine(pool: Pool, folder: Path) -> None:
    rates = measure_rates(pool)
    assert min(rates.read_bytes, rates.rows, rates.products, rates.pairs) > 0
    assert rates.products > rates.rows / 100
    assert measure_rates(pool) is rates
    opened = open_index(folder, pool)
    measure_recall(opened, pool, QUERIES, K)
    made = plan(pool, 5, K, opened, least_recall=0)
    assert made.index_seconds
    assert (made.engine == "index") == (made.index_seconds < made.scan_seconds)
