"""Retrieved image sets: through the pool's shards and over HTTP, and from the pocket pool."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_remote import Service, serving
from web import web

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.models import Clip, image_features, load_clip, text_features
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.pocket.pictures import evaluation_split
from retrieve_or_generate.pocket.world import planted
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.retrieve import _from_web, retrieve
from retrieve_or_generate.retrieve.guard import DownloadPolicy
from retrieve_or_generate.settings import CurateSettings, RetrieveSettings
from retrieve_or_generate.store import write_tar
from retrieve_or_generate.tasks import Task, load_task

SEARCH = RetrieveSettings(k=12, modalities=("image", "text"), strategy="both")
CURATION = CurateSettings(keep_fraction=0.6)
ROWS, DEAD, NSFW, BROKEN = 48, (3, 17), (5, 30), (8,)


@dataclass(frozen=True)
class World:
    pool: Pool
    policy: DownloadPolicy
    asked: list[str]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("pocket")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("textures")


def write_pool(folder: Path, base: str, clip: Clip, task: Task) -> None:
    """Four dozen pictures of the textures' training split, two the same, one a copy of a test image."""
    split = evaluation_split("textures", "train")[:ROWS]
    jpegs, captions = [row.jpeg for row in split], [f"seamless {task.class_names[row.label]} pattern" for row in split]
    jpegs[20], captions[20] = jpegs[10], captions[10]
    copy = evaluation_split("textures", "test")[0]
    jpegs[40], captions[40] = copy.jpeg, f"{task.class_names[copy.label]} fabric"
    pixels = decode_all(jpegs, clip.image_size)
    for row in BROKEN:
        jpegs[row] = b"<html>not found</html>"
    for name, features in (("img_emb", image_features(clip, pixels)), ("text_emb", text_features(clip, captions))):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0000.npy", features.astype(np.float16))
    keys = [f"{row:09d}" for row in range(ROWS)]
    live = [row for row in range(ROWS) if row not in DEAD]
    write_tar(folder / "images/00000.tar", [(f"{keys[row]}.jpg", jpegs[row]) for row in live])
    (folder / "metadata").mkdir()
    metadata = {
        "url": [f"{base}/{row}.jpg" for row in range(ROWS)],
        "caption": captions,
        "key": keys,
        "NSFW": ["NSFW" if row in NSFW else "UNLIKELY" for row in range(ROWS)],
        "md5": [hashlib.md5(data).hexdigest() for data in jpegs],
    }
    pq.write_table(pa.table(metadata), folder / "metadata/metadata_0000.parquet")


@pytest.fixture(scope="module")
def world(clip: Clip, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("pools") / "dozens"
    pictures: dict[str, bytes] = {}
    with web(pictures) as (base, policy, asked):
        write_pool(folder, base, clip, task)
        pool = open_pool(str(folder))
        images = pool.image_bytes(range(ROWS))
        pictures.update({f"/{row}.jpg": data for row, data in images.items()})
        yield World(pool, policy, asked)


@pytest.fixture(scope="module")
def from_shards(world: World, clip: Clip, task: Task, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return retrieve(task, world.pool, clip, tmp_path_factory.mktemp("sets") / "set", SEARCH, CURATION)


def test_the_same_set_over_http_and_from_shards(
    world: World, from_shards: ImageSet, clip: Clip, task: Task, tmp_path: Path
) -> None:
    over_http = SEARCH.model_copy(update={"fetch": "http"})
    downloaded = retrieve(task, world.pool, clip, tmp_path, over_http, CURATION, policy=world.policy)
    pd.testing.assert_frame_equal(downloaded.manifest, from_shards.manifest)
    keys = from_shards.kept["key"].tolist()
    assert downloaded.images(keys) == from_shards.images(keys)
    for shard in sorted(from_shards.folder.glob("*.tar")):
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()
    status = pq.read_table(tmp_path / ".downloads/status.parquet").to_pandas().set_index("key")
    assert status.loc[status["status"] == "failed", "reason"].to_dict() == {
        str(row): "http_404: 127.0.0.1" for row in DEAD
    }
    assert status.index[status["status"] == "undecodable"].tolist() == [str(row) for row in BROKEN]
    assert status.index[status["verified"] != "verified"].tolist() == [str(row) for row in sorted(DEAD)]
    assert not set(world.asked) & {f"/{row}.jpg" for row in NSFW}, "NSFW rows are not even asked for"
    count = len(world.asked)
    retrieve(task, world.pool, clip, tmp_path, over_http, CURATION, policy=world.policy)
    assert len(world.asked) == count
    assert [path.name for path in (tmp_path / ".downloads").glob("[0-9]*")] == []


def test_every_candidate_is_a_row_with_its_reason(from_shards: ImageSet, world: World) -> None:
    manifest = from_shards.manifest.set_index("key")
    row = {key: int(key) for key in manifest.index}
    reasons = {row[key]: reason for key, reason in manifest["reason"].items()}
    assert {r: reasons[r] for r in DEAD} == dict.fromkeys(DEAD, "dead_link")
    assert {r: reasons[r] for r in NSFW} == dict.fromkeys(NSFW, "nsfw")
    assert {r: reasons[r] for r in BROKEN} == dict.fromkeys(BROKEN, "undecodable")
    assert reasons[40] == "contaminated"
    assert sorted((reasons[10], reasons[20])).count("duplicate") == 1
    assert (manifest["source"] == "retrieved").all()
    first: Any = json.loads(manifest["origin"].iloc[0])
    assert first == {"pool": "dozens", "row": row[manifest.index[0]], "url": first["url"]}
    assert manifest["caption"].str.len().min() > 0
    assert manifest["query"].str.len().min() > 0


def test_a_second_call_opens_what_is_there(world: World, from_shards: ImageSet, clip: Clip, task: Task) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in from_shards.folder.iterdir()}
    again = retrieve(task, world.pool, clip, from_shards.folder, SEARCH, CURATION)
    assert {path: path.stat().st_mtime_ns for path in from_shards.folder.iterdir()} == stamps
    pd.testing.assert_frame_equal(again.manifest, from_shards.manifest)
    with pytest.raises(UsageError, match="holds a finished image set"):
        retrieve(task, world.pool, clip, from_shards.folder, SEARCH.model_copy(update={"k": 5}), CURATION)


def test_classes_with_fewer_examples_than_asked_for_are_told(
    world: World, clip: Clip, task: Task, tmp_path: Path
) -> None:
    there = np.bincount(task.split("train").labels)
    asked = SEARCH.model_copy(update={"examples_per_class": int(there.max()) + 1})
    made = retrieve(task, world.pool, clip, tmp_path, asked, CURATION)
    assert made.record["config"]["few_examples"] == dict(zip(task.class_names, there.tolist(), strict=True))


def test_candidates_without_any_url_are_not_downloaded(tmp_path: Path) -> None:
    """As from a service that tells none."""
    rows = pa.table({"row": [3, 5], "url": pa.array([None, ""], pa.string())})
    with pytest.raises(UsageError, match="none of the 2 candidates has a URL to download"):
        next(_from_web(rows, tmp_path, SEARCH, None, None))
    assert list(tmp_path.iterdir()) == []


def visible(folder: Path) -> dict[str, bytes]:
    """The files of an image set."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_an_unfinished_set_is_made_anew_to_the_same_bytes(
    world: World, from_shards: ImageSet, clip: Clip, task: Task, tmp_path: Path
) -> None:
    (tmp_path / "candidates.json").write_text('{"unfinished": "0"}')
    (tmp_path / "00000.tar").write_bytes(b"half")
    retrieve(task, world.pool, clip, tmp_path, SEARCH, CURATION)
    assert visible(tmp_path) == visible(from_shards.folder)


def test_a_set_from_a_service_alone(world: World, clip: Clip, task: Task, tmp_path: Path) -> None:
    stored = np.concatenate([world.pool.embeddings(shard, "image") for shard in world.pool.shards]).astype(np.float32)
    told = world.pool.metadata(range(ROWS), ("url", "caption", "NSFW")).to_pylist()

    def answer(question: dict[str, Any]) -> list[dict[str, Any]]:
        similarity = stored @ np.array(question["embedding_input"], np.float32)
        best = np.argsort(-similarity, kind="stable")[: question["num_images"]]
        return [{"id": int(row), "similarity": float(similarity[row]), **told[row]} for row in best]

    with serving(Service(answer=answer)) as url:
        search = {"engine": "remote", "service": url, "k": 12, "modalities": ["image"], "fetch": "http"}
        settings = RetrieveSettings.model_validate(search)
        made = retrieve(task, None, clip, tmp_path, settings, CURATION, policy=world.policy)
    again = retrieve(task, None, clip, tmp_path, settings, CURATION, policy=world.policy)
    assert again.key == made.key, "the service is gone, the set is there"
    local = {"k": 12, "modalities": ["image"], "fetch": "http"}
    here = retrieve(
        task, world.pool, clip, tmp_path / "here", RetrieveSettings.model_validate(local), CURATION, policy=world.policy
    )
    columns = ["key", "label", "query", "sha256", "status", "reason", "rank"]
    pd.testing.assert_frame_equal(made.manifest[columns], here.manifest[columns])
    assert set(made.manifest["reason"]) >= {"nsfw", "dead_link"}


@pytest.mark.parametrize("fetch", ["shards", "http"])
@pytest.mark.slow
def test_killed_before_any_of_its_files_takes_its_name_it_ends_with_the_same_bytes(
    fetch: Any, world: World, from_shards: ImageSet, clip: Clip, task: Task, tmp_path: Path
) -> None:
    settings, replace = SEARCH.model_copy(update={"fetch": fetch}), Path.replace

    def make(out: Path) -> dict[str, bytes]:
        retrieve(task, world.pool, clip, out, settings, CURATION, policy=world.policy)
        return visible(out)

    whole = make(tmp_path / "whole")
    if fetch == "shards":
        assert whole == visible(from_shards.folder)
    for moment in range(1000):
        left = [moment]

        def dies(self: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return replace(self, target)

        out = tmp_path / f"killed-{moment}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", dies)
            try:
                make(out)
            except KeyboardInterrupt:
                patch.undo()
                assert make(out) == whole, f"killed at file {moment}"
                continue
        assert moment > 10
        break


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """`rog retrieve` on the pocket pool, ten times ended by SIGKILL; each time the same call goes on, until it ends by itself."""
    options = ("--task", "textures", "--set", "retrieve.strategy=both", "--set", "retrieve.modalities=[image, text]")
    code = "import sys; from retrieve_or_generate.cli import main; main()"

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-c", code, "retrieve", *options, "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole, takes = visible(tmp_path / "whole"), time.monotonic() - started
    moments = np.random.default_rng(int(os.environ.get("ROG_KILL_SEED", "0"))).uniform(0.3, 1.0, 10) * takes
    kills = 0
    for number, moment in enumerate(moments):
        process = start(tmp_path / f"{number // 2}")
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        kills += process.poll() is None
        process.kill()
        process.wait()
    for number in range(len(moments) // 2):
        assert start(tmp_path / f"{number}").wait() == 0
        assert visible(tmp_path / f"{number}") == whole
    assert kills >= len(moments) // 2


def test_a_search_that_cannot_be_writes_nothing(world: World, clip: Clip, task: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="over text embeddings"):
        retrieve(task, world.pool, clip, tmp_path / "set", SEARCH.model_copy(update={"engine": "index"}), CURATION)
    assert not (tmp_path / "set").exists()


def test_what_was_planted_in_the_pocket_pool(clip: Clip, task: Task, tmp_path: Path) -> None:
    pool = open_pool("pocket")
    truth = planted().to_pandas().set_index("row")
    found = {
        strategy: retrieve(
            task,
            pool,
            clip,
            tmp_path / strategy,
            RetrieveSettings(strategy=strategy, k=200, candidates_per_class=300),
            CurateSettings(),
        )
        for strategy in ("semantic", "substring")
    }
    for image_set in found.values():
        kept = truth.loc[image_set.kept["key"].astype(int)]
        assert not (kept["kind"] == "evaluation_copy").any()
        assert (kept["class_name"].to_numpy() == image_set.kept["class_name"].to_numpy()).mean() > 0.7
        assert (image_set.counts() > 0).all()
    kinds = {s: truth.loc[i.manifest["key"].astype(int), "caption_kind"].value_counts() for s, i in found.items()}
    assert kinds["semantic"]["synonym"] > 10 * kinds["substring"].get("synonym", 0)
    assert kinds["substring"]["inside_word"] > kinds["semantic"].get("inside_word", 0)
