"""rog and the real clip-retrieval read each other's folders and find the same neighbours (make interop)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sidecar import ClipRetrieval

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models import Clip, image_features, text_features
from retrieve_or_generate.pixels import decode, decode_all, encode_jpeg
from retrieve_or_generate.pool.build import build_index
from retrieve_or_generate.pool.embed import embed_pool
from retrieve_or_generate.pool.index import measure_recall, open_index, search_index
from retrieve_or_generate.pool.layout import Modality, Pool, open_pool
from retrieve_or_generate.pool.recipe import IndexRecipe
from retrieve_or_generate.pool.scan import scan
from retrieve_or_generate.retrieve.remote import Neighbour, ServicePolicy, query_service, service_indexes
from retrieve_or_generate.store import write_tar

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]  # each start of the other tool takes half a minute
POLICY = ServicePolicy(timeout_seconds=120)
TEXTS = ("a photo of a cat", "two dogs on a sofa", "a red bicycle, 1990")
K = 12


@dataclass(frozen=True)
class World:
    """`theirs` was embedded by clip-retrieval, `ours` by rog; the service has indexes of both, by name."""

    theirs: Pool
    ours: Pool
    indexes: dict[str, Path]
    url: str


def write_tars(folder: Path, images: list[Path]) -> Path:
    """Two webdataset shards with captions and URLs, as img2dataset writes them."""
    for number, part in enumerate((images[:20], images[20:])):
        named = []
        for path in part:
            told = {"url": f"http://pictures.example/{path.name}", "caption": f"picture {path.stem} of a series"}
            key = f"{number:05d}{path.stem:0>4}"
            data = path.read_bytes() if path.suffix == ".jpg" else encode_jpeg(decode(path.read_bytes()))
            named += [(f"{key}.jpg", data), (f"{key}.txt", told["caption"].encode())]
            named.append((f"{key}.json", json.dumps(told).encode()))
        write_tar(folder / f"{number:05d}.tar", named)
    return folder


def our_index(pool: Pool, clip: Clip, folder: Path) -> Path:
    """The pool's index as rog builds it, lists on disk, in the form that clip-retrieval serves: image.index/ and metadata/."""
    recipe = IndexRecipe(
        name="ours", pool="ours", model=clip.name, modality="image", factory_string="IVF1,Flat", nprobe=1, train_rows=48
    )
    build_index(pool, recipe, folder / "image.index")
    shutil.copytree(pool.folder / "metadata", folder / "metadata")
    return folder


@pytest.fixture(scope="module")
def world(
    image_folder: Path, clip: Clip, clip_retrieval: ClipRetrieval, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    clip_retrieval.inference(str(image_folder), folder / "theirs", "--enable_text", "False")
    theirs = open_pool(str(folder / "theirs"))
    tars = write_tars(folder / "tars", sorted(image_folder.rglob("*.*")))
    embed_pool(tars, folder / "ours", clip, jobs=1, batch_size=8)
    ours = open_pool(str(folder / "ours"))
    for pool in (theirs, ours):
        clip_retrieval.index(pool.folder, folder / f"index of {pool.name}")
    indexes = {pool.name: folder / f"index of {pool.name}" for pool in (theirs, ours)}
    indexes["built by rog"] = our_index(ours, clip, folder / "built")
    with clip_retrieval.back(indexes, folder) as url:
        yield World(theirs, ours, indexes, url)


def assert_exact(found: list[list[Neighbour]], pool: Pool, xq: np.ndarray, modality: Modality = "image") -> None:
    """The service's answers are the exact neighbours in the pool's files."""
    D, I = scan(xq, [pool.embeddings(shard, modality) for shard in pool.shards], K)  # noqa: E741
    assert [[row["id"] for row in rows] for rows in found] == I.tolist()
    assert np.array([[row["similarity"] for row in rows] for rows in found]) == pytest.approx(D, abs=1e-6)


def test_rog_reads_what_clip_retrieval_embedded(world: World, clip: Clip, image_folder: Path) -> None:
    pool = world.theirs
    assert (pool.rows, pool.dim) == (48, clip.embed_dim)
    paths = [Path(path) for path in pool.metadata(columns=("key",))["key"].to_pylist()]
    assert paths == sorted(image_folder.rglob("*.*"))
    features = image_features(clip, decode_all([path.read_bytes() for path in paths], clip.image_size))
    stored = np.asarray(pool.embeddings(pool.shards[0], "image"), np.float32)
    cosine = (features * stored).sum(axis=1) / np.linalg.norm(stored, axis=1)
    assert cosine.min() > 0.999


def test_the_service_and_the_scan_find_the_same_for_an_embedding(world: World, clip: Clip) -> None:
    xq = text_features(clip, [f"{text}, number {n}" for text in TEXTS for n in range(5)])
    found = query_service(world.url, embeddings=xq, k=K, index="theirs", policy=POLICY)
    assert_exact(found, world.theirs, xq)


def test_the_service_and_the_scan_find_the_same_for_a_text(world: World, clip: Clip) -> None:
    found = query_service(world.url, texts=TEXTS, k=K, index="theirs", policy=POLICY)
    assert_exact(found, world.theirs, text_features(clip, TEXTS))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_clip_retrieval_serves_a_pool_that_rog_wrote(modality: Modality, world: World, clip: Clip) -> None:
    found = query_service(world.url, texts=TEXTS, k=K, index="ours", modality=modality, policy=POLICY)
    assert_exact(found, world.ours, text_features(clip, TEXTS), modality)
    for row in found[0]:
        told = world.ours.metadata([row["id"]], ("url", "caption")).to_pylist()[0]
        assert {"url": row["url"], "caption": row["caption"]} == told


def test_clip_retrieval_serves_an_index_that_rog_built(world: World, clip: Clip) -> None:
    found = query_service(world.url, texts=TEXTS, k=K, index="built by rog", policy=POLICY)
    assert_exact(found, world.ours, text_features(clip, TEXTS))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_rog_searches_an_index_that_clip_retrieval_built(modality: Modality, world: World, clip: Clip) -> None:
    xq = text_features(clip, [f"{text}, number {n}" for text in TEXTS for n in range(40)])
    recipe = IndexRecipe(
        name="x", pool="ours", model=clip.name, modality=modality, factory_string="Flat", nprobe=1, train_rows=1
    )
    index = open_index(world.indexes["ours"], world.ours, recipe)
    D, I = search_index(index, world.ours, xq, K)  # noqa: E741
    exact, rows = scan(xq, [world.ours.embeddings(shard, modality) for shard in world.ours.shards], K)
    assert I.tolist() == rows.tolist()
    assert D.tolist() == exact.tolist()
    assert measure_recall(index, world.ours, xq, K).recall_at_k == 1.0


def test_near_copies_go_only_when_asked(world: World) -> None:
    plain, unique = (
        query_service(world.url, texts=TEXTS[:1], k=48, index="ours", deduplicate=drop, policy=POLICY)[0]
        for drop in (False, True)
    )
    assert sorted(row["id"] for row in plain) == list(range(48))
    assert {row["id"] for row in plain} - {row["id"] for row in unique} in ({0}, {47}), "the last is nearly the first"


def test_what_the_service_does_not_have(world: World) -> None:
    assert service_indexes(world.url, POLICY) == list(world.indexes)
    with pytest.raises(UsageError, match=r"has several indexes \(theirs, ours, built by rog\); name one"):
        query_service(world.url, texts=TEXTS, k=K, policy=POLICY)
    with pytest.raises(UsageError, match=r"answers 500: .*an index without embeddings of that modality does this"):
        query_service(world.url, texts=TEXTS, k=K, index="theirs", modality="text", policy=POLICY)
