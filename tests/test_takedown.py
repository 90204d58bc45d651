"""Taking an image down: it is gone from everything, what followed from it is known, and a kill changes nothing of that."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate import api, cli
from retrieve_or_generate.blocklist import Blocklist, default_blocklist
from retrieve_or_generate.compare import compare
from retrieve_or_generate.compare.plan import TrialPlan, chosen_rows
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment, dump_experiment, load_experiment
from retrieve_or_generate.finetune import data, decoded
from retrieve_or_generate.finetune.data import decoded_set
from retrieve_or_generate.image_set import (
    CANDIDATES,
    MANIFEST,
    ImageSetWriter,
    load_image_set,
    read_table,
    seal_image_set,
)
from retrieve_or_generate.kept_texts import CAPTIONS, KeptTexts
from retrieve_or_generate.pixels import encode_jpeg
from retrieve_or_generate.pool.layout import open_pool
from retrieve_or_generate.store import cache_folder, read_json, seal, write_json, write_tar
from retrieve_or_generate.takedown import Takedown, takedown

CLASSES = ("one", "two")
IMAGES = 14
OVERRIDES = (
    *(
        "tasks=[textures]",
        "sources=[retrieved, perturbed]",
        "scales=[8]",
        "seeds=1",
        "retrieve.candidates_per_class=12",
        "retrieve.k=12",
    ),
    *("curate.keep_fraction=0.5", "synthesize.num_inference_steps=2", "perturb.shown=[]"),
    *("finetune.updates=2", "finetune.batch_size=8"),
)
TAKEN = 5  # a retrieved image of class "two"; the other set has it under another key, the pool too


def image(number: int, kind: int = 0) -> bytes:
    return encode_jpeg(np.random.default_rng([kind, number]).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def url(number: int) -> str:
    return f"http://pictures.example/{number}.jpg"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def write_set(folder: Path, source: str, rows: list[tuple[str, bytes, dict[str, Any]]], config: dict[str, Any]) -> None:
    """A curated set; every fifth row is dropped as a duplicate."""
    with ImageSetWriter(
        folder, task="numbers", source=source, key=source, class_names=CLASSES, config=config, shard_size=4
    ) as writer:
        for place, (key, data, origin) in enumerate(rows):
            writer.add(key=key, label=place % 2, caption="x", origin=origin, query="x", image=data)
        writer.add(
            key="dead", label=0, caption="", origin={"url": url(TAKEN)}, query="", image=None, reason="dead_link"
        )
        writer.finish()
    table = read_table(folder / CANDIDATES).to_pandas()
    table.loc[(np.arange(len(table)) % 5 == 4) & (table["reason"] == ""), "reason"] = "duplicate"
    kept = table["reason"] == ""
    table["status"] = np.where(kept, "kept", "dropped")
    table["rank"] = table[kept].groupby("label").cumcount().reindex(table.index).fillna(-1).astype(np.int64)
    manifest = pa.Table.from_pandas(table, schema=MANIFEST, preserve_index=False)
    seal_image_set(folder, manifest, curation={"none": True}, evaluation_copies={})


def manifest_of(image_set: Path) -> str:
    return str(read_json(image_set / "image_set.json")["files"]["manifest.parquet"]["sha256"])


def write_trial(run: Path, name: str, image_set: Path, quotas: tuple[int, int], seed: int) -> None:
    cell = {"source": "retrieved", "scale": sum(quotas), "seed": seed, "seed_value": seed, "quotas": list(quotas)}
    write_config(run, name, cell | {"image_set": manifest_of(image_set)})


def write_mixture(run: Path, name: str, parts: dict[Path, tuple[int, int]]) -> None:
    cell = {"source": "mixed-half", "scale": 9, "seed": 0, "seed_value": 0, "quotas": [9, 9]}
    drawn = {path.name: list(quotas) for path, quotas in parts.items()}
    write_config(run, name, cell | {"parts": drawn, "image_sets": {path.name: manifest_of(path) for path in parts}})


def write_config(run: Path, name: str, config: dict[str, Any]) -> None:
    config |= {"task": {"name": "numbers"}}
    write_json(run / "trials" / name / "config.json", config)
    seal(run / "trials" / name, "result.json", "k", [run / "trials" / name / "config.json"], metrics={})


def write_pool(folder: Path) -> None:
    vectors = np.eye(IMAGES, 16, dtype=np.float16)
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb/img_emb_0000.npy", vectors)
    keys = [f"{number:09d}" for number in range(IMAGES)]
    table = pa.table({"url": [url(number) for number in range(IMAGES)], "caption": keys, "key": keys})
    pq.write_table(table, folder / "metadata/metadata_0000.parquet")
    members = [
        (f"{keys[n]}.{kind}", image(n) if kind == "jpg" else b"t") for n in range(IMAGES) for kind in ("jpg", "txt")
    ]
    write_tar(folder / "images/00000.tar", members)
    files = [path for path in folder.rglob("*.*") if path.is_file()]
    seal(folder, "pool.json", "p", files, pool="numbers", model="none")


@dataclass(frozen=True)
class World:
    folder: Path
    trained: frozenset[str]  # trials that trained on the image

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        return self.runs / "run"

    @property
    def retrieved(self) -> Path:
        return self.run / "sets/numbers/retrieved"

    @property
    def pool(self) -> Path:
        return self.folder / "pool"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("takedown")
    run = folder / "runs/run"
    retrieved, perturbed, other = (
        run / "sets/numbers/retrieved",
        run / "sets/numbers/perturbed-0.4",
        folder / "runs/other",
    )
    write_set(retrieved, "retrieved", [(f"{n:04d}", image(n), {"url": url(n), "row": n}) for n in range(IMAGES)], {})
    of = {"of": read_json(retrieved / "image_set.json")["files"]["manifest.parquet"]["sha256"]}
    write_set(perturbed, "perturbed", [(f"{n:04d}", image(n, 1), {"init_key": f"{n:04d}"}) for n in range(IMAGES)], of)
    write_set(other, "retrieved", [(f"x{n}", image(n), {"url": f"http://copies.example/{n}"}) for n in (1, TAKEN)], {})
    for seed in range(6):
        write_trial(run, f"small-{seed}", retrieved, (2, 2), seed)
    write_trial(run, "perturbed", perturbed, (5, 5), 0)
    write_trial(run, "elsewhere", other, (1, 0), 0)
    write_mixture(run, "mixed", {retrieved: (1, 0), perturbed: (5, 5)})
    write_mixture(run, "mixed-without", {retrieved: (1, 0), perturbed: (5, 0)})
    image_set = load_image_set(retrieved)
    plans = {f"small-{seed}": read_json(run / f"trials/small-{seed}/config.json") for seed in range(6)}
    trained = {
        name
        for name, config in plans.items()
        if f"{TAKEN:04d}" in chosen_rows(image_set, TrialPlan("numbers", "retrieved", 4, config["seed"], config))
    }
    assert 0 < len(trained) < 6
    (run / "experiment.yaml").write_text(dump_experiment(Experiment()))
    write_json(run / "environment.json", {"inputs": "before"})
    for name in ("run.json", "results.parquet", "results.csv", "verdict.json", "report.html", "figures/a.svg"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    (retrieved / ".described").mkdir()
    (retrieved / ".described/a.npy").write_bytes(image(TAKEN))
    write_pool(folder / "pool")
    rows = [{"url": url(n), "sha256": sha256(image(n)), "md5": md5(image(n)), "image": image(n)} for n in (2, TAKEN)]
    for name, part in (("00000", rows[:1]), ("00001", rows[1:])):
        path = folder / f"runs/half/.downloads/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), path, compression="none")
        path.with_suffix(".json").write_text("{}")
    write_json(folder / "runs/half/candidates.json", {"unfinished": "k"})
    (folder / "runs/half/00000.tar").write_bytes(image(TAKEN))
    return World(folder, frozenset(trained))


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    return copied(made, tmp_path / "world")


def copied(made: World, folder: Path) -> World:
    return World(shutil.copytree(made.folder, folder), made.trained)


def holders(folder: Path, data: bytes) -> list[str]:
    """Files below the folder in which these bytes stand."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths if data in path.read_bytes()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def taken(world: World, hash: str = sha256(image(TAKEN)), pool: bool = True) -> Takedown:
    return takedown(hash, [world.runs], str(world.pool) if pool else None)


HASHES = {"sha256": sha256(image(TAKEN)), "md5": md5(image(TAKEN)).upper(), "url": url(TAKEN)}


@pytest.mark.parametrize("hash", HASHES.values(), ids=HASHES)
def test_no_byte_of_it_is_left(hash: str, world: World) -> None:
    before = holders(world.folder, image(TAKEN))
    assert len(before) == 6, "retrieved set and what was computed of it, other set, pool, download, unfinished shard"
    done = taken(world, hash)
    assert holders(world.folder, image(TAKEN)) == []
    assert holders(world.folder, image(TAKEN, kind=1)) == [], "nor of the picture that was made of it"
    assert done.sha256 == (sha256(image(TAKEN)),)
    assert {folder.name: count for folder, count in done.sets.items()} == {
        "retrieved": 1,
        "perturbed-0.4": 1,
        "other": 1,
    }
    assert done.pool_images == 1
    assert done.problems == ()


def test_what_it_was_decoded_to_is_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decoded, data):
        monkeypatch.setattr(module, "KEPT_FROM_BYTES", 0)
    pixels = decoded_set(load_image_set(world.runs / "run/sets/numbers/retrieved"), 8).pixels
    one = np.array(pixels[TAKEN]).tobytes()
    assert holders(cache_folder() / "decoded", one)
    taken(world, "0" * 64)
    assert holders(cache_folder() / "decoded", one), "nothing was found, so nothing of it can be there"
    taken(world)
    assert holders(cache_folder() / "decoded", one) == []


def test_what_a_model_said_of_it_is_forgotten(world: World) -> None:
    kept = KeptTexts(CAPTIONS, "k")
    kept.add({sha256(image(TAKEN)): "a taken picture", sha256(image(1)): "another"})
    taken(world, md5(image(TAKEN)))
    assert dict(KeptTexts(CAPTIONS, "k").read()) == {sha256(image(1)): "another"}


def test_everything_else_is_as_it_was(world: World) -> None:
    before = {name: load_image_set(world.run / "sets/numbers" / name) for name in ("retrieved", "perturbed-0.4")}
    rows = {name: image_set.manifest.set_index("key") for name, image_set in before.items()}
    fingerprint = open_pool(str(world.pool)).fingerprint
    taken(world)
    for name, was in rows.items():
        image_set = load_image_set(world.run / "sets/numbers" / name)  # verifies every checksum
        now = image_set.manifest.set_index("key")
        assert list(now.index) == list(was.index)
        gone = now.loc[f"{TAKEN:04d}"]
        assert (gone["status"], gone["reason"], gone["rank"], gone["shard"]) == ("dropped", "takedown", -1, "")
        assert gone["sha256"] == was.loc[f"{TAKEN:04d}", "sha256"], "the row still says which image it was"
        others = now.index != f"{TAKEN:04d}"
        columns = [column for column in now.columns if column != "rank"]
        assert now[others][columns].equals(was[others][columns])
        kept = image_set.kept
        for label in (0, 1):
            ranks = kept.loc[kept["label"] == label, "rank"].tolist()
            assert ranks == list(range(len(ranks)))
        assert kept["key"].tolist() == [key for key in before[name].kept["key"] if key != f"{TAKEN:04d}"], "same order"
        assert [sha256(data) for data in image_set.images(kept["key"].tolist())] == kept["sha256"].tolist()
        assert image_set.record["counts"]["two"]["takedown"] == 1
        assert image_set.record["curation"] == {"none": True}
    pool = open_pool(str(world.pool))  # verifies every checksum
    assert pool.rows == IMAGES
    assert pool.fingerprint == fingerprint, "its indexes and runs go on"
    assert sorted(pool.image_bytes(range(IMAGES))) == [n for n in range(IMAGES) if n != TAKEN]
    parts = sorted(path.name for path in (world.runs / "half/.downloads").iterdir())
    assert parts == ["00000.json", "00000.parquet"], "only the part that held it is fetched again"


def test_what_was_trained_on_it_is_listed_and_marked(world: World) -> None:
    done = taken(world)
    expected = world.trained | {"perturbed", "mixed"}
    assert {trial.name for trial in done.trials} == expected
    for trial in (world.run / "trials").iterdir():
        assert (trial / "stale.json").exists() == (trial.name in expected)
        assert (trial / "result.json").exists()
    assert read_json(world.run / "trials/perturbed/stale.json") == {"takedown": [sha256(image(TAKEN))]}
    assert [run.name for run in done.runs] == ["run"]
    left = {path.name for path in world.run.iterdir() if not path.name.startswith(".")}
    assert left == {"experiment.yaml", "environment.json", "sets", "trials"}


def test_a_second_image_finds_trials_of_before_the_first(world: World) -> None:
    taken(world)
    image_set = load_image_set(world.retrieved)
    config = read_json(world.run / "trials/small-0/config.json")
    plan = TrialPlan("numbers", "retrieved", 4, 0, config)
    version = next(path for path in world.retrieved.glob(".manifest-*.parquet"))
    image_set.manifest = read_table(version).to_pandas()
    key = next(key for key in chosen_rows(image_set, plan) if key != f"{TAKEN:04d}")
    done = taken(world, sha256(image(int(key))))
    assert "small-0" in {trial.name for trial in done.trials}


def test_it_is_on_the_blocklist_by_all_its_names(world: World) -> None:
    done = taken(world, url(TAKEN))
    listed = Blocklist.load()
    assert listed.blocks(sha256=sha256(image(TAKEN)))
    assert listed.blocks(md5=md5(image(TAKEN)))
    assert listed.blocks(url=url(TAKEN))
    assert not listed.blocks(url=url(1), sha256=sha256(image(1)))
    assert len(done.listed) >= 3
    assert taken(world, url(TAKEN)).listed == ()


def test_what_is_found_nowhere_is_not_fetched_either(world: World) -> None:
    before = contents(world.folder)
    done = taken(world, "ab" * 32)
    assert (done.sets, done.pool_images, done.trials, done.listed) == ({}, 0, (), ("ab" * 32,))
    after = contents(world.folder)
    assert {name for name in before if before[name] != after.get(name)} == {"runs/half/00000.tar"}, (
        "unfinished work goes"
    )


def test_a_second_time_changes_nothing(world: World) -> None:
    taken(world)
    before = contents(world.folder)
    done = taken(world)
    assert contents(world.folder) == before
    assert (done.sets, done.pool_images) == ({}, 0)
    assert {trial.name for trial in done.trials} >= world.trained


class Killed(BaseException):
    """What a process that is killed would not survive either."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Die just before the step-th change of a folder: a rename or a removal."""
    count = 0

    def counted(name: str) -> None:
        original = getattr(Path, name)

        def change(self: Path, *args: Any, **options: Any) -> Any:
            nonlocal count
            if not self.name.startswith(".tmp-") or name == "replace":
                count += 1
                if count == step:
                    raise Killed
            return original(self, *args, **options)

        monkeypatch.setattr(Path, name, change)

    for name in ("replace", "unlink"):
        counted(name)
    yield count


def killed_at(step: int, hash: str, world: World) -> bool:
    """Whether a takedown that dies at its step-th change of a folder got that far."""
    with pytest.MonkeyPatch.context() as patch:
        next(kill_at(step, patch))
        try:
            taken(world, hash)
        except Killed:
            return True
    return False


def ends_alike(hash: str, steps: Iterable[int], made: World, folder: Path) -> int:
    """Kill takedowns at these steps, call each again, and compare with one that was let be; the first step that none reaches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROG_CACHE", str(folder / "cache"))
        whole = copied(made, folder / "whole")
        done = taken(whole, hash)
        for step in steps:
            patch.setenv("ROG_CACHE", str(folder / f"cache-{step}"))
            world = copied(made, folder / f"killed-{step}")
            if not killed_at(step, hash, world):
                return step
            again = taken(world, hash)
            assert contents(world.folder) == contents(whole.folder), f"killed at step {step}"
            assert [trial.name for trial in again.trials] == [trial.name for trial in done.trials], (
                f"killed at step {step}"
            )
            assert contents(folder / f"cache-{step}") == contents(folder / "cache"), f"killed at step {step}"
            shutil.rmtree(world.folder)
    return 0


def test_killed_it_goes_on_to_the_same_end(made: World, tmp_path: Path) -> None:
    assert ends_alike(HASHES["md5"], (9, 24, 37), made, tmp_path) == 0


def test_killed_among_the_sets_it_remembers_what_it_knew(made: World, tmp_path: Path) -> None:
    assert ends_alike(HASHES["sha256"], (19, 32), made, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("hash", HASHES.values(), ids=HASHES)
def test_killed_anywhere_it_goes_on_to_the_same_end(hash: str, made: World, tmp_path: Path) -> None:
    assert 40 < ends_alike(hash, range(1, 200), made, tmp_path) < 200


@pytest.mark.parametrize(
    "name", ["manifest.parquet", "candidates.parquet", "00000.tar", "image_set.json", "candidates.json"]
)
def test_a_damaged_set_is_said_and_the_rest_done(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = world.runs / "other" / name
    damaged.write_bytes(damaged.read_bytes()[: -1200 if name.endswith(".tar") else -20])
    with pytest.raises(SystemExit) as ended:
        cli.main(["takedown", sha256(image(TAKEN)), str(world.runs), "--pool", str(world.pool), "--json"])
    assert ended.value.code == 3
    out, err = capsys.readouterr()
    assert "the image may still be in" in err
    assert "other, which is damaged: delete it" in err
    told = json.loads(out.splitlines()[-1])
    assert len(told["sets"]) == 2
    assert told["pool_images"] == 1
    assert [name.split("/")[1] for name in holders(world.folder, image(TAKEN))] == ["other"]


def test_from_the_command_line(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    with pytest.raises(SystemExit) as ended:
        cli.main(["takedown", HASHES["md5"]])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sha256 {sha256(image(TAKEN))}"
    assert sum(line.endswith("trained on it, its results are stale") for line in lines) >= 1 + len(world.trained)
    assert f"{world.retrieved}: 1 image removed" in lines
    assert f"{world.run}: rog compare makes anew what followed from it" in lines
    assert holders(world.folder / "runs", image(TAKEN)) == []


@pytest.mark.parametrize("hash", ["cat.jpg", "ab" * 20, "12345", ""])
def test_what_is_no_hash(hash: str, world: World) -> None:
    with pytest.raises(UsageError, match=f"{hash!r}: give the sha256 .* or md5 .* of the image, or its URL"):
        taken(world, hash)
    with pytest.raises(UsageError, match="no such folder"):
        api.takedown("ab" * 32, (world.folder / "nowhere",))
    assert not default_blocklist().exists()


@pytest.mark.slow
def test_a_run_goes_on_without_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Path(
        shutil.copytree(open_pool("pocket").folder, tmp_path / "pool", ignore=shutil.ignore_patterns("indices"))
    )
    experiment = load_experiment(None, (*OVERRIDES, f"pool={pool}"))
    run = tmp_path / "run"
    compare(experiment, run, jobs=1)
    first = read_json(run / "verdict.json")
    image_set = load_image_set(run / "sets/textures/retrieved")
    config = read_json(next((run / "trials").glob("textures-retrieved-*")) / "config.json")
    key = chosen_rows(image_set, TrialPlan("textures", "retrieved", config["scale"], 0, config))[0]
    data = image_set.images([key])[0]
    monkeypatch.setattr("retrieve_or_generate.blocklist.default_blocklist", lambda: tmp_path / "blocklist.txt")
    monkeypatch.setattr("retrieve_or_generate.takedown.memory.cache_folder", lambda: tmp_path)
    done = takedown(md5(data), [tmp_path], str(pool))
    assert done.pool_images >= 1
    assert {folder.name for folder in done.sets} == {"retrieved", "perturbed-0.4"}
    assert done.trials
    assert holders(tmp_path, data) == []
    again = compare(experiment, run, jobs=1)
    assert set(again) == set(first)
    retrieved = load_image_set(run / "sets/textures/retrieved")
    assert key not in set(retrieved.kept["key"])
    trials = set(pq.read_table(run / "results.parquet")["trial"].to_pylist())
    assert not trials & {trial.name for trial in done.trials}
    assert holders(tmp_path, data) == []
    assert api.verify(run)[0] > 0
