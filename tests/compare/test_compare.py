"""The whole comparison on a corner of the pocket world: every joint with its real engine, nothing done twice, same bytes again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate.api import status
from retrieve_or_generate.compare import compare
from retrieve_or_generate.compare.folder import inputs_key, load_tasks, write_head
from retrieve_or_generate.compare.results import RESULTS
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.experiment import Experiment, load_experiment
from retrieve_or_generate.store import read_json

OVERRIDES = (
    "tasks=[textures]",
    "scales=[8, 16]",
    "seeds=1",
    "retrieve.candidates_per_class=12",
    "retrieve.k=12",
    "curate.keep_fraction=0.5",
    "synthesize.num_inference_steps=2",
    "perturb.shown=[0.8]",
    "finetune.updates=2",
    "finetune.batch_size=8",
)


def small(*more: str) -> Experiment:
    return load_experiment(None, (*OVERRIDES, *more))


def files(run: Path) -> dict[str, int]:
    """Every file of a run and when it was last written."""
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}


def values(run: Path) -> dict[tuple[Any, ...], float]:
    table = pq.read_table(run / "results.parquet").to_pandas()
    named = table.set_index(["task", "source", "scale", "seed", "metric", "split", "trial"])["value"]
    return dict(named.items())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "run"
    compare(small(), out, jobs=1)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_the_folder_holds_what_the_contract_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"experiment.yaml", "environment.json", "trials", "sets", "results.parquet", "results.csv"}
    assert names >= {"verdict.json", "report.html", "stages.json", "figures", "run.json"}
    table = pq.read_table(finished / "results.parquet")
    assert table.schema.equals(RESULTS)
    assert len({trial.name for trial in (finished / "trials").iterdir()}) == 1 + 3 * 2
    assert set(table["trial"].to_pylist()) == {trial.name for trial in (finished / "trials").iterdir()}
    for trial in (finished / "trials").iterdir():
        assert {path.name for path in trial.iterdir()} == {
            "config.json",
            "metrics.jsonl",
            "predictions.parquet",
            "result.json",
        }


def test_sources_are_matched(finished: Path) -> None:
    table = pq.read_table(finished / "results.parquet").to_pandas()
    trained = table[table["source"] != "none"]
    assert (trained["n_train"] == trained["scale"]).all()
    quotas = {
        scale: {tuple(read_json(finished / "trials" / trial / "config.json")["quotas"]) for trial in set(rows["trial"])}
        for scale, rows in trained.groupby("scale")
    }
    assert all(len(of_all_sources) == 1 for of_all_sources in quotas.values())


def test_mixtures_have_trials_of_their_own_and_no_sets(run: Path) -> None:
    of = "of: [retrieved, synthetic]"
    ways = {"half": "", "added": ", counts: [8, null]", "weighed": ", gamma: 0.3"}
    variants = ", ".join(f"mixed-{name}: {{mix: {{{of}{how}}}}}" for name, how in ways.items())
    sources = ["retrieved", "synthetic", *(f"mixed-{name}" for name in ways)]
    mixed = small(f"sources={sources}", "scales=[8]", f"variants={{{variants}}}")
    tasks = load_tasks(mixed)
    write_head(run, mixed, "cpu", inputs_key(mixed, tasks), tasks)  # its sets are those of this run
    sets = files(run / "sets")
    compare(mixed, run, jobs=1)
    table = pq.read_table(run / "results.parquet").to_pandas()
    assert dict(table.groupby("source")["n_train"].first()) == dict.fromkeys(sources, 8) | {"mixed-added": 16}
    assert files(run / "sets") == sets
    assert {"sets": [2, 2], "trials": [5, 5], "report": True}.items() <= status(run).items()
    trial = table[table["source"] == "mixed-weighed"]["trial"].iloc[0]
    config = read_json(run / "trials" / trial / "config.json")
    assert config["mix"]["gamma"] == 0.3
    assert np.sum(list(config["parts"].values()), axis=0).tolist() == config["quotas"]


def test_a_repeated_call_writes_nothing(run: Path) -> None:
    before = files(run)
    first = read_json(run / "verdict.json")
    assert compare(small(), run, jobs=1) == first
    assert files(run) == before


def test_one_more_seed_runs_its_own_trials_only(run: Path) -> None:
    before = {name: when for name, when in files(run).items() if name.startswith(("trials/", "sets/"))}
    known = values(run)
    compare(small("seeds=2"), run, jobs=1)
    after = files(run)
    assert all(after[name] == when for name, when in before.items())
    added = values(run)
    assert {name: added[name] for name in known} == known
    assert len({cell[-1] for cell in added}) == 1 + 3 * 2 * 2


def test_two_clean_runs_give_equal_values(finished: Path, tmp_path: Path) -> None:
    compare(small(), tmp_path / "again", jobs=2)
    assert values(tmp_path / "again") == values(finished)
    for path in sorted((finished / "sets").rglob("*.tar")):
        assert (tmp_path / "again" / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_another_experiment_in_the_folder_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match=r"run: holds another experiment \(scales, finetune differ\); choose another"):
        compare(small("scales=[8]", "finetune.updates=3"), run)
    with pytest.raises(UsageError, match="not empty and not a run"):
        compare(small(), run / "trials")


def test_other_inputs_are_refused(run: Path) -> None:
    head = run / "environment.json"
    head.write_text(head.read_text().replace(read_json(head)["inputs"], "0123456789abcdef"))
    with pytest.raises(UsageError, match="begun with another pool, model, task or version of rog"):
        compare(small(), run)


def test_a_scale_larger_than_the_sets_is_said_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"scale 500: class by class the sources retrieved share only \d+ images"):
        compare(small("scales=[500]"), tmp_path / "run", jobs=1)
    assert [path.name for path in (tmp_path / "run/sets/textures").iterdir()] == ["retrieved"]


@pytest.mark.parametrize("name", ["sets/textures/synthetic/00000.tar", "results.parquet"])
def test_a_changed_byte_is_found_and_named(run: Path, name: str) -> None:
    path = run / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{path.name}: its bytes changed"):
        compare(small(), run)


def _start(out: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from retrieve_or_generate.compare import compare; "
        "from retrieve_or_generate.experiment import load_experiment\n"
        "if __name__ == '__main__': compare(load_experiment(None, tuple(sys.argv[2:])), Path(sys.argv[1]), jobs=1)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(out), *OVERRIDES]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_it_ends_with_the_same_values(finished: Path, tmp_path: Path) -> None:
    """Twenty kills; a run that ends between two of them is compared, and the next begins in a new folder."""
    moments = iter(np.random.default_rng(int(os.environ.get("ROG_KILL_SEED", "0"))).uniform(3, 25, 20))
    folders = [tmp_path / "run0"]
    moment = next(moments, None)
    while moment is not None:
        process = _start(folders[-1])
        try:
            assert process.wait(moment) == 0
            folders.append(tmp_path / f"run{len(folders)}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            moment = next(moments, None)
    compare(small(), folders[-1], jobs=1)
    for folder in folders:
        assert values(folder) == values(finished)
    print(f"20 kills, {len(folders)} runs compared")
