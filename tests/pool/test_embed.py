"""Pools made from images: every kind of source, what is lost on the way, kills, and the same numbers as one image at a time."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from retrieve_or_generate.cli import main
from retrieve_or_generate.errors import IncompleteError, IntegrityError, UsageError
from retrieve_or_generate.models import Clip, image_features, load_clip, text_features
from retrieve_or_generate.pixels import decode_all, encode_jpeg, encode_png
from retrieve_or_generate.pool import embed
from retrieve_or_generate.pool.embed import EmbedSettings, embed_pool
from retrieve_or_generate.pool.encode import Encoder, each_once
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.verify import verify_pool


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("pocket")


def picture(number: int, width: int = 40, height: int = 40) -> np.ndarray:
    rng = np.random.default_rng(number)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return (127 + 120 * np.stack(waves, 2)).astype(np.uint8)


def jpeg(number: int, width: int = 40, height: int = 40) -> bytes:
    return encode_jpeg(picture(number, width, height))


def make_tars(folder: Path, shards: int = 3, each: int = 20) -> Path:
    """As img2dataset writes them: jpg, json and txt of a sample together; one that is broken, one that has no image."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * each, (shard + 1) * each):
                key = f"{shard:05d}{number:04d}"
                info = {"url": f"http://pictures.example/{number}", "caption": f"picture {number}", "NSFW": "UNLIKELY"}
                info |= {"similarity": 0.3, "sha256": "x", "original_width": 2000, "punsafe": "no number"}
                image = b"broken" if number == 7 else jpeg(number)
                parts = {"jpg": image, "json": json.dumps(info).encode(), "txt": f"picture {number}".encode()}
                if number == 11:
                    del parts["jpg"]
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{shard:05d}.parquet").write_bytes(b"img2dataset's table of the shard")
    return folder


def dropped(out: Path) -> list[dict[str, str]]:
    return [row for path in sorted((out / "dropped").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def all_embeddings(pool: Pool, modality: Any = "image") -> np.ndarray:
    return np.concatenate([pool.embeddings(shard, modality) for shard in pool.shards])


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


SMALL = EmbedSettings(shard_bytes=50_000)


def test_webdataset_shards(tmp_path: Path, clip: Clip) -> None:
    source, out = make_tars(tmp_path / "tars"), tmp_path / "pool"
    told: list[tuple[int, int]] = []
    made = embed_pool(source, out, clip, settings=SMALL, batch_size=7, progress=lambda *n: told.append(n))
    assert (made["rows"], made["dropped"], made["model"], made["pool"]) == (58, 2, "pocket", "pool")
    assert told[-1][0] == told[-1][1]
    assert told == sorted(set(told)), "each amount once"
    lost = {row["image_path"]: row["reason"] for row in dropped(out)}
    assert lost["000000011"] == "no_image"
    assert lost["000000007"].startswith("undecodable: format")

    pool = open_pool(str(out))
    assert verify_pool(pool).images == pool.rows == 58
    assert len(pool.shards) > 1
    assert pool.model == "pocket"
    rows = pool.metadata(
        columns=("url", "caption", "NSFW", "similarity", "punsafe", "hash", "width", "key")
    ).to_pylist()
    numbers = [number for number in range(60) if number not in (7, 11)]
    assert [row["caption"] for row in rows] == [f"picture {number}" for number in numbers]
    assert rows[0]["hash"] == mmh3.hash64(b"http://pictures.example/0picture 0")[0]
    assert (rows[0]["similarity"], rows[0]["punsafe"], rows[0]["width"]) == (0.3, None, 40.0)
    assert len({row["key"] for row in rows}) == 58
    assert pool.image_bytes([0, 57]) == {0: jpeg(0), 57: jpeg(59)}

    alone = image_features(clip, decode_all([jpeg(number) for number in numbers], clip.image_size))
    assert (alone * all_embeddings(pool)).sum(1).min() > 0.9995
    texts = text_features(clip, [f"picture {number}" for number in numbers])
    assert (texts * all_embeddings(pool, "text")).sum(1).min() > 0.9995


def test_a_second_call_reads_the_seal_and_other_inputs_are_told_apart(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_tars(tmp_path / "tars", 1, 5), tmp_path / "pool"
    made, before = embed_pool(source, out, clip), tree(out)
    assert "unfinished.json" not in before
    assert not [name for name in before if name.startswith("embed_")]
    monkeypatch.setattr(embed, "Encoder", None)  # nothing is left to run
    assert embed_pool(source, out, clip, batch_size=2, jobs=1) == made
    assert tree(out) == before
    with pytest.raises(UsageError, match="holds another pool or something else"):
        embed_pool(source, out, clip, settings=EmbedSettings(captions=False))
    with pytest.raises(UsageError, match="holds another pool or something else"):
        embed_pool(source, tmp_path / "tars", clip)


def test_the_same_source_gives_the_same_bytes_with_any_number_of_threads(tmp_path: Path, clip: Clip) -> None:
    source = make_tars(tmp_path / "tars")
    for jobs in (1, 3):
        embed_pool(source, tmp_path / f"{jobs}" / "pool", clip, settings=SMALL, batch_size=7, jobs=jobs)
    assert tree(tmp_path / "1" / "pool") == tree(tmp_path / "3" / "pool")


def test_an_image_folder_with_captions_beside_the_images(tmp_path: Path, clip: Clip) -> None:
    """Sub-folders, other formats, other shapes; equal names in two folders stay apart."""
    source, out = tmp_path / "photos", tmp_path / "pool"
    (source / "a").mkdir(parents=True)
    (source / "b").mkdir()
    images = {"a/one.jpg": jpeg(1, 90, 60), "b/one.JPEG": jpeg(2, 50, 80), "b/two.png": encode_png(picture(3, 33, 33))}
    images["b/huge.jpg"] = jpeg(4, 700, 500)
    for name, data in images.items():
        (source / name).write_bytes(data)
    (source / "a/one.txt").write_text("first\n")
    (source / "notes.md").write_text("no image")
    embed_pool(source, out, clip)
    pool = open_pool(str(out))
    rows = pq.read_table(pool.shards[0].metadata).to_pylist()
    assert [row["image_path"] for row in rows] == ["a/one.jpg", "b/huge.jpg", "b/one.JPEG", "b/two.png"]
    assert [row["caption"] for row in rows] == ["first", None, None, None]
    assert [(row["width"], row["height"]) for row in rows] == [(90, 60), (700, 500), (50, 80), (33, 33)]
    assert rows[0]["hash"] == mmh3.hash64(b"a/one.jpgfirst")[0]
    assert pool.shards[0].text_embeddings is not None
    assert pool.image_bytes(range(4)) == dict(enumerate(images[row["image_path"]] for row in rows))
    alone = image_features(clip, decode_all([images[row["image_path"]] for row in rows], clip.image_size))
    assert (alone * all_embeddings(pool)).sum(1).min() > 0.999


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_that_name_images(tmp_path: Path, clip: Clip, kind: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    table = {"image_path": [f"{n}.jpg" for n in range(4)], "URL": list("abcd"), "TEXT": list("efgh"), "hash": [1] * 4}
    path = tmp_path / f"images.{kind}"
    if kind == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [table, *zip(*table.values(), strict=True)]))
    else:
        pq.write_table(pa.table(table), path)
    embed_pool(path, tmp_path / "pool", clip)
    pool = open_pool(str(tmp_path / "pool"))
    assert pool.metadata(columns=("url", "caption", "hash")).to_pylist() == [
        {"url": url, "caption": word, "hash": mmh3.hash64((url + word).encode())[0]}
        for url, word in zip("abc", "efg", strict=True)
    ]
    assert dropped(tmp_path / "pool") == [{"image_path": "3.jpg", "reason": "no_image"}]


def test_parts_that_a_download_wrote(tmp_path: Path, clip: Clip) -> None:
    source = tmp_path / "parts"
    source.mkdir()
    for part in range(2):
        rows = [
            {"key": f"{part}{n}", "url": f"u{part}{n}", "status": "ok", "reason": "", "sha256": "", "image": jpeg(n)}
            for n in range(3)
        ]
        rows[1] |= {"status": "failed", "reason": "http: 404", "image": None}
        pq.write_table(pa.Table.from_pylist(rows), source / f"{part:05d}.parquet")
    embed_pool(source, tmp_path / "pool", clip)
    pool = open_pool(str(tmp_path / "pool"))
    assert pool.metadata()["url"].to_pylist() == ["u00", "u02", "u10", "u12"]
    assert pool.shards[0].text_embeddings is None
    assert dropped(tmp_path / "pool") == [{"image_path": f"{p}1", "reason": "no_image: http: 404"} for p in (0, 1)]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: None, "nothing to embed; give a folder with"),
        (lambda folder: (folder / "a.jpg").write_bytes(b"no"), "none of its 1 images could be read"),
        (lambda folder: (folder / "a.tar").write_bytes(b"x" * 3000), r"a.tar: not a whole tar"),
        (lambda folder: (folder / "a.parquet").write_bytes(b"x" * 300), r"a.parquet: cannot be read"),
        (lambda folder: pq.write_table(pa.table({"x": [1]}), folder / "a.parquet"), "no column image"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, clip: Clip, write: Any, words: str) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    with pytest.raises(UsageError, match=words):
        embed_pool(tmp_path / "source", tmp_path / "pool", clip)
    if (tmp_path / "pool/img_emb").exists():
        with pytest.raises(IncompleteError):
            open_pool(str(tmp_path / "pool"))


def test_settings_that_are_none(tmp_path: Path, clip: Clip) -> None:
    with pytest.raises(UsageError, match="unknown precision 'float61'; did you mean 'float16'"):
        embed_pool(tmp_path, tmp_path / "pool", clip, settings=EmbedSettings(precision="float61"))


def test_equal_captions_are_embedded_once() -> None:
    asked: list[list[str]] = []

    def lengths(texts: list[str]) -> torch.Tensor:
        asked.append(texts)
        return torch.tensor([[len(text)] for text in texts])

    assert each_once(["cat", "ox", "cat", ""], lengths).tolist() == [[3], [2], [3], [0]]
    assert asked == [["", "cat", "ox"]]


def test_half_width_products_give_nearly_the_same(clip: Clip) -> None:
    squares = [picture(number) for number in range(40)]
    exact = Encoder(clip).images(squares).float()
    assert (exact * Encoder(clip, "bfloat16").images(squares).float()).sum(1).min() > 0.999
    some = Encoder(clip)
    some.images(squares)
    assert torch.equal(some.images(squares[:3]), Encoder(clip).images(squares[:3]))


def killed_before_file(left: int, source: Path, out: Path, clip: Clip) -> int:
    """Embed in a process that dies where its file number `left` would take its name; the exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, replace, done = 1, Path.replace, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done > left:
            os._exit(9)
        return replace(self, target)

    try:
        Path.replace = counted  # type: ignore[assignment,method-assign]
        embed_pool(source, out, clip, settings=SMALL, batch_size=7)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # this test runs no thread when it forks
def test_killed_before_any_file_takes_its_name_and_resumed_it_is_the_same_to_the_byte(
    tmp_path: Path, clip: Clip
) -> None:
    source = make_tars(tmp_path / "tars", 2, 14)
    embed_pool(source, tmp_path / "pool", clip, settings=SMALL, batch_size=7)
    whole = tree(tmp_path / "pool")
    shards = sum(name.startswith("img_emb/") for name in whole)
    for left in range(
        6 * shards + 2
    ):  # five files and the seal of each shard; the mark of what is unfinished, the pool's seal
        out = tmp_path / f"killed-{left}" / "pool"
        assert killed_before_file(left, source, out, clip) == 9
        embed_pool(source, out, clip, settings=SMALL, batch_size=7)
        assert tree(out) == whole
    assert killed_before_file(6 * shards + 2, source, tmp_path / "last" / "pool", clip) == 0


def test_a_run_that_broke_off_goes_on_after_its_last_shard(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tars(tmp_path / "tars")
    embed_pool(source, tmp_path / "whole" / "pool", clip, settings=SMALL, batch_size=7)
    out, write = tmp_path / "pool", embed.write_tar
    calls: list[Path] = []

    def broken(path: Path, named: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, named)

    monkeypatch.setattr(embed, "write_tar", broken)
    with pytest.raises(KeyboardInterrupt):
        embed_pool(source, out, clip, settings=SMALL, batch_size=7)
    with pytest.raises(IncompleteError, match="goes on with it"):
        open_pool(str(out))
    with pytest.raises(UsageError, match="holds another pool"):
        embed_pool(source, out, clip, settings=EmbedSettings(captions=False))
    embed_pool(source, out, clip, settings=SMALL, batch_size=7)
    assert calls[1:3] == [calls[1]] * 2
    assert len(calls) == len(set(calls)) + 1
    assert tree(out) == tree(tmp_path / "whole" / "pool")


def test_killed_after_its_seal_was_written(tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_tars(tmp_path / "tars", 1, 5), tmp_path / "pool"
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_clear", lambda _: None)
        embed_pool(source, out, clip)
    assert (out / "unfinished.json").is_file()
    assert open_pool(str(out)).rows == 5
    embed_pool(source, out, clip)
    assert not [name for name in tree(out) if name.startswith(("embed_", "unfinished"))]


def test_a_picture_that_changes_meanwhile_is_named(tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the pool would keep another picture than the one that it has the embedding of."""
    source, write = tmp_path / "photos", embed.write_tar
    source.mkdir()
    (source / "a.jpg").write_bytes(jpeg(1))

    def late(path: Path, named: Any) -> None:
        (source / "a.jpg").write_bytes(jpeg(2))
        write(path, named)

    monkeypatch.setattr(embed, "write_tar", late)
    with pytest.raises(IntegrityError, match=r"photos: a\.jpg changed while it was embedded"):
        embed_pool(source, tmp_path / "pool", clip)
    assert not (tmp_path / "pool/images/00000.tar").exists()


def test_features_that_are_no_numbers_are_not_written(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model gives that overflows in half width."""
    source = make_tars(tmp_path / "tars", 1, 5)
    monkeypatch.setattr(Encoder, "images", lambda self, squares: torch.full((len(squares), 4), torch.inf))
    with pytest.raises(UsageError, match=r"img_emb_0000.npy: features that are not finite; embed with --precision"):
        embed_pool(source, tmp_path / "pool", clip)
    assert not list((tmp_path / "pool").rglob("*.npy"))


def test_a_finished_shard_that_was_changed_is_not_taken(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_tars(tmp_path / "tars"), tmp_path / "pool"
    monkeypatch.setattr(embed, "_finish", lambda *_: {})
    embed_pool(source, out, clip, settings=SMALL)
    path = out / "img_emb/img_emb_0000.npy"
    path.write_bytes(path.read_bytes()[:-2] + b"ab")
    with pytest.raises(IntegrityError, match=r"img_emb_0000.npy: its bytes changed"):
        embed_pool(source, out, clip, settings=SMALL)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_tars(tmp_path / "tars", 1, 6), tmp_path / "pool"
    with pytest.raises(SystemExit) as ended:
        main(["index", "embed", str(source), "--out", str(out), "--no-images", "--no-captions", "--json"])
    assert ended.value.code == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["rows"], record["dropped"], record["dim"]) == (6, 0, load_clip("pocket").embed_dim)
    assert not (out / "images").exists()
    assert not record["captions"]
    assert not (out / "text_emb").exists()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_within_rounding(tmp_path: Path, clip: Clip) -> None:
    source = make_tars(tmp_path / "tars")
    embed_pool(source, tmp_path / "cpu", clip, settings=SMALL)
    for precision in ("float32", "float16", "bfloat16"):
        settings = EmbedSettings(shard_bytes=50_000, precision=precision)
        embed_pool(source, tmp_path / precision, load_clip("pocket"), settings=settings, device="cuda")
        pools = [open_pool(str(tmp_path / name)) for name in ("cpu", precision)]
        for modality in ("image", "text"):
            first, second = (all_embeddings(pool, modality).astype(np.float32) for pool in pools)
            assert (first * second).sum(1).min() > 0.999
