"""Image sets: what is added is accounted for, bytes follow from what was added, and damage is named."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.image_set import (
    CANDIDATES,
    CANDIDATES_SEAL,
    MANIFEST,
    MANIFEST_TABLE,
    REASONS,
    SEAL,
    ImageSet,
    ImageSetWriter,
    ShardReader,
    candidates_record,
    load_image_set,
    read_table,
    seal_image_set,
)
from retrieve_or_generate.pixels import encode_jpeg, encode_png

CLASSES = ("one", "two", "three")


def _image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return encode_png(pixels) if number % 2 else encode_jpeg(pixels)


def _writer(folder: Path, key: str = "k1", shard_size: int = 4) -> ImageSetWriter:
    return ImageSetWriter(
        folder, task="numbers", source="retrieved", key=key, class_names=CLASSES, config={"k": 3}, shard_size=shard_size
    )


def _fill(writer: ImageSetWriter, rows: int = 11) -> None:
    for number in range(rows):
        writer.add(
            key=f"{number:06d}",
            label=number % 3,
            caption=f"caption ä {number}",
            origin={"pool": "pocket", "row": number},
            query="a one.",
            image=_image(number),
        )


def _candidates(folder: Path) -> Path:
    with _writer(folder) as writer:
        _fill(writer)
        writer.add(key="nsfw", label=0, caption="", origin={}, query="", image=_image(99), reason="nsfw")
        writer.add(key="dead", label=1, caption="", origin={}, query="", image=None, reason="dead_link")
        writer.add(key="text", label=1, caption="", origin={}, query="", image=b"<html>", strength=0.4)
        writer.finish()
    return folder


def _keep_all(folder: Path) -> None:
    table = read_table(folder / CANDIDATES).to_pandas()
    kept = table["reason"] == ""
    table["status"] = np.where(kept, "kept", "dropped")
    table["rank"] = table[kept].groupby("label").cumcount().reindex(table.index).fillna(-1).astype(np.int64)
    seal_image_set(folder, pa.Table.from_pandas(table, schema=MANIFEST, preserve_index=False), curation={"none": True})


def _finished(folder: Path) -> ImageSet:
    _keep_all(_candidates(folder))
    return load_image_set(folder, "numbers")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_candidate_is_a_row(tmp_path: Path) -> None:
    image_set = _finished(tmp_path / "set")
    manifest = image_set.manifest
    assert list(manifest.columns) == MANIFEST.names
    assert len(manifest) == 14
    assert manifest.set_index("key")["reason"][["nsfw", "dead", "text"]].tolist() == [
        "nsfw",
        "dead_link",
        "undecodable",
    ]
    assert set(manifest["reason"]) <= {"", *REASONS}
    dropped = manifest[manifest["status"] == "dropped"]
    assert (dropped["shard"] == "").all()
    assert (dropped["rank"] == -1).all()
    assert image_set.counts().tolist() == [4, 4, 3]
    assert sum(image_set.record["counts"][name]["candidates"] for name in CLASSES) == 14


def test_rows_tell_what_was_added(tmp_path: Path) -> None:
    row = _finished(tmp_path / "set").manifest.iloc[5]
    assert row["class_name"] == "three"
    assert row["source"] == "retrieved"
    assert row["caption"] == "caption ä 5"
    assert json.loads(row["origin"]) == {"pool": "pocket", "row": 5}
    assert (row["width"], row["height"]) == (9, 8)
    assert row["sha256"] == hashlib.sha256(_image(5)).hexdigest()
    assert np.isnan(row["strength"])


def test_images_come_back_as_they_were(tmp_path: Path) -> None:
    image_set = _finished(tmp_path / "set")
    keys = ["000007", "000000", "000010", "000007"]
    assert image_set.images(keys) == [_image(int(key)) for key in keys]
    with pytest.raises(KeyError, match="nobody"):
        image_set.images(["nobody"])
    with pytest.raises(IntegrityError, match="no such shard"):
        image_set.images(["nsfw"])


def test_shards_are_webdataset(tmp_path: Path) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    folder = _candidates(tmp_path)
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            files = tariterators.tar_file_expander([{"url": path.name, "stream": stream}])
            samples += list(tariterators.group_by_keys(files))
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(11)]
    assert samples[3]["txt"].decode() == "caption ä 3"
    assert json.loads(samples[3]["json"])["origin"]["row"] == 3
    assert samples[3]["png"] == _image(3)


def test_same_candidates_give_the_same_bytes(tmp_path: Path) -> None:
    _finished(tmp_path / "a")
    _finished(tmp_path / "deeper" / "b")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "deeper" / "b")
    assert sorted(_bytes(tmp_path / "a")) == sorted(
        ["00000.tar", "00001.tar", "00002.tar", CANDIDATES, CANDIDATES_SEAL, MANIFEST_TABLE, SEAL]
    )


def test_an_empty_set_is_a_set(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        writer.finish()
    _keep_all(tmp_path)
    image_set = load_image_set(tmp_path)
    assert image_set.counts().tolist() == [0, 0, 0]
    assert len(image_set.rows_at(np.zeros(3, int))) == 0


def _fail(folder: Path) -> None:
    with _writer(folder) as writer:
        _fill(writer)
        raise RuntimeError("stop")


def test_a_run_that_failed_is_redone_to_the_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        _fail(tmp_path / "a")
    assert candidates_record(tmp_path / "a") is None
    assert not list((tmp_path / "a").glob(".tmp-*"))
    _finished(tmp_path / "a")
    _finished(tmp_path / "b")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_image_set import _fill, _writer
with _writer(Path(sys.argv[1])) as writer:
    _fill(writer)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_is_redone_to_the_same_bytes(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "a"), here], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UsageError, match="unfinished"):
        load_image_set(tmp_path / "a")
    _finished(tmp_path / "a")
    left = {name: data for name, data in _bytes(tmp_path / "a").items() if not name.startswith(".tmp-")}
    _finished(tmp_path / "b")
    assert left == _bytes(tmp_path / "b")


def test_finished_candidates_are_recognised_by_their_key(tmp_path: Path) -> None:
    _candidates(tmp_path)
    record = candidates_record(tmp_path, "k1")
    assert record is not None
    assert record["config"] == {"k": 3}
    assert candidates_record(tmp_path, "k2") is None
    assert candidates_record(tmp_path / "nowhere") is None


def test_a_finished_set_is_not_overwritten(tmp_path: Path) -> None:
    _finished(tmp_path)
    before = _bytes(tmp_path)
    with pytest.raises(UsageError, match="finished image set; choose another --out"):
        _writer(tmp_path, key="k2")
    assert _bytes(tmp_path) == before


@pytest.mark.parametrize("name", ["00000.tar", "holiday.jpg", "candidates.parquet"])
def test_somebody_elses_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UsageError, match="not empty, and not an image set"):
        _writer(tmp_path)
    assert _bytes(tmp_path) == {name: b"precious"}


@pytest.mark.parametrize("key", ["", "../up", "/root", "a/b", "a.b", "ä", "x" * 81, "a b", "a\n"])
def test_unsafe_keys_are_refused(tmp_path: Path, key: str) -> None:
    with _writer(tmp_path) as writer, pytest.raises(ValueError, match="key"):
        writer.add(key=key, label=0, caption="", origin={}, query="", image=_image(0))


def test_what_is_no_candidate_is_refused(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        _fill(writer, 1)
        with pytest.raises(ValueError, match="added already"):
            _fill(writer, 1)
        with pytest.raises(ValueError, match="label 3"):
            writer.add(key="x", label=3, caption="", origin={}, query="", image=_image(0))
        with pytest.raises(ValueError, match="neither image nor reason"):
            writer.add(key="x", label=0, caption="", origin={}, query="", image=None)
        with pytest.raises(ValueError, match="'ugly' is none of"):
            writer.add(key="x", label=0, caption="", origin={}, query="", image=None, reason="ugly")


@pytest.mark.parametrize("text", ["{", "3", "[]", "null"])
def test_a_damaged_record_of_the_candidates_is_named(tmp_path: Path, text: str) -> None:
    with _writer(tmp_path) as writer:
        _fill(writer)
        writer.finish()
    (tmp_path / CANDIDATES_SEAL).write_text(text)
    with pytest.raises(IntegrityError, match=r"candidates.json: not .*\. Make .* anew"):
        candidates_record(tmp_path)


def test_a_missing_or_unfinished_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such image set"):
        load_image_set(tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        UsageError, match=r"pictures: not an image set; rog retrieve .* make them, of images of your own"
    ):
        load_image_set(tmp_path / "pictures")
    with pytest.raises(UsageError, match="unfinished"):
        load_image_set(_candidates(tmp_path / "set"))
    with _writer(tmp_path / "begun") as writer:
        _fill(writer)
        with pytest.raises(UsageError, match="candidates are unfinished"):
            seal_image_set(tmp_path / "begun", MANIFEST.empty_table())


def test_a_set_of_another_task_is_refused(tmp_path: Path) -> None:
    _finished(tmp_path)
    with pytest.raises(UsageError, match="of task 'numbers', not 'digits'"):
        load_image_set(tmp_path, "digits")


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _grow(data: bytes) -> bytes:
    return data + b"\0"


@pytest.mark.parametrize("damage", [_cut, _flip, _grow, lambda _: b""], ids=["cut", "flip", "grow", "empty"])
@pytest.mark.parametrize("name", ["00001.tar", CANDIDATES, CANDIDATES_SEAL, MANIFEST_TABLE])
def test_any_changed_file_is_named(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    _finished(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(IntegrityError, match=name):
        load_image_set(tmp_path)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    _finished(tmp_path)
    (tmp_path / "00002.tar").unlink()
    with pytest.raises(IntegrityError, match=r"00002\.tar: missing"):
        load_image_set(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [('"k": 3', '"k": 4'), ('"numbers"', '"digits"'), ('"kept": 4', '"kept": 5'), ('"one"', '"uno"')]
)
def test_an_edited_seal_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    _finished(tmp_path)
    text = (tmp_path / SEAL).read_text()
    assert old in text
    (tmp_path / SEAL).write_text(text.replace(old, new))
    with pytest.raises(IntegrityError, match=r"image_set\.json: changed"):
        load_image_set(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": "x"}', "\0\0", '{"key": "x", "files": {}}'])
def test_a_damaged_seal_is_named(tmp_path: Path, text: str) -> None:
    _finished(tmp_path)
    (tmp_path / SEAL).write_text(text)
    with pytest.raises(IntegrityError, match=r"image_set\.json"):
        load_image_set(tmp_path)


def test_a_truncated_shard_is_noticed_without_checksums(tmp_path: Path) -> None:
    image_set = _finished(tmp_path)
    data = (tmp_path / "00000.tar").read_bytes()
    for size in (0, 100, 512, 700, len(data) // 2):
        (tmp_path / "00000.tar").write_bytes(data[:size])
        with pytest.raises(IntegrityError, match=r"00000\.tar"):
            load_image_set(tmp_path, verify=False).images(image_set.kept["key"].tolist())


def _tar(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for member in members:
            member.size = 3 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"abc"))


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "b/a.jpg", "a.exe", "a.jpg.sh", "a\\b.jpg", ".jpg"])
def test_unsafe_member_names_are_refused(tmp_path: Path, name: str) -> None:
    _tar(tmp_path / "00000.tar", tarfile.TarInfo("a.jpg"), tarfile.TarInfo(name))
    with pytest.raises(IntegrityError, match="unsafe member"):
        ShardReader(tmp_path).read([("00000.tar", "a")])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_not_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    _tar(tmp_path / "00000.tar", member)
    with pytest.raises(IntegrityError, match="unsafe member"):
        ShardReader(tmp_path).read([("00000.tar", "a")])


def test_two_images_of_one_key_are_refused(tmp_path: Path) -> None:
    _tar(tmp_path / "00000.tar", tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.png"))
    with pytest.raises(IntegrityError, match="'a' twice"):
        ShardReader(tmp_path).read([("00000.tar", "a")])


@pytest.mark.parametrize("shard", ["", "../00000.tar", "/etc/passwd", "00001.tar"])
def test_a_shard_name_leads_nowhere_else(tmp_path: Path, shard: str) -> None:
    with pytest.raises(IntegrityError, match="no such shard"):
        ShardReader(tmp_path / "set").read([(shard, "a")])


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_table(tmp_path / "x.parquet")
    pd.DataFrame({"key": ["a"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(IntegrityError, match=r"x\.parquet: not a manifest"):
        read_table(tmp_path / "x.parquet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return _finished(tmp_path_factory.mktemp("sets") / "set")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.one_of(st.none(), st.integers(0, 2**62)),
)
def test_smaller_quotas_are_subsets_of_larger_ones(
    finished: ImageSet, some: list[int], more: list[int], order_seed: int | None
) -> None:
    small, large = np.minimum(some, more), np.maximum(some, more)
    few, many = finished.rows_at(small, order_seed), finished.rows_at(large, order_seed)
    assert np.bincount(few["label"], minlength=3).tolist() == small.tolist()
    assert set(few["key"]) <= set(many["key"])
    assert few["label"].is_monotonic_increasing
    for label in range(3):
        assert (
            many[many["label"] == label]["key"].tolist()[: small[label]] == few[few["label"] == label]["key"].tolist()
        )


def test_without_a_seed_the_ranks_are_the_order(finished: ImageSet) -> None:
    rows = finished.rows_at(np.array([2, 3, 1]))
    assert rows["rank"].tolist() == [0, 1, 0, 1, 2, 0]


def test_seeds_give_other_subsets(finished: ImageSet) -> None:
    chosen = {tuple(finished.rows_at(np.array([2, 2, 2]), seed)["key"]) for seed in range(8)}
    assert len(chosen) > 4


def test_too_large_a_quota_names_the_class(finished: ImageSet) -> None:
    with pytest.raises(UsageError, match="3 images of 'three', but 4 are asked for"):
        finished.rows_at(np.array([1, 1, 4]))
