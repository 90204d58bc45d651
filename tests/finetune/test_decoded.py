"""Images decoded once: what is kept, when it counts, and what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from colours import make_clip

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune import data, decoded
from retrieve_or_generate.finetune.data import Chosen, decoded_set
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter, load_image_set, read_table, seal_image_set
from retrieve_or_generate.pixels import decode_all, encode_png
from retrieve_or_generate.tasks.split import Split

RNG = np.random.default_rng(0)
PICTURES = [encode_png(RNG.integers(0, 256, (20 + 5 * row, 24, 3), dtype=np.uint8)) for row in range(9)]


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Everything is kept, in a folder of the test's own."""
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    for module in (decoded, data):
        monkeypatch.setattr(module, "KEPT_FROM_BYTES", 0)
    return tmp_path / "cache/decoded"


def split(pictures: list[bytes] = PICTURES) -> Split:
    return Split(
        [f"{row}.png" for row in range(len(pictures))], pictures, np.zeros(len(pictures), np.int64), "birds/test"
    )


def opened(digest: str = "a", size: int = 16, pictures: list[bytes] = PICTURES) -> np.ndarray:
    return decoded.decoded(split(pictures), lambda: digest, size)


def held() -> int:
    """Arrays that are kept."""
    return len(list(decoded.decoded_folder().glob("*.npy")))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each decoding is of."""
    calls, decode = [], Split.decode_into

    def seen(self: Split, *rest: object) -> None:
        calls.append(len(self))
        decode(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Split, "decode_into", seen)
    return calls


def test_decoded_once_and_mapped(monkeypatch: pytest.MonkeyPatch, all_is_large: Path) -> None:
    calls = counted(monkeypatch)
    first, second = opened(), opened()
    assert calls == [9]
    assert isinstance(first, np.memmap)
    assert np.array_equal(first, decode_all(PICTURES, 16))
    assert np.array_equal(first, second)
    assert held() == 1
    assert not first.flags.writeable


def test_who_comes_meanwhile_waits_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, decode = counted(monkeypatch), Split.decode_into

    def slow(self: Split, *rest: object) -> None:
        time.sleep(0.2)
        decode(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Split, "decode_into", slow)
    with ThreadPoolExecutor(4) as threads:
        arrays = list(threads.map(lambda _: opened(), range(4)))
    assert calls == [9]
    assert all(np.array_equal(array, decode_all(PICTURES, 16)) for array in arrays)


def test_other_images_sizes_and_framings_are_other_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    opened("a"), opened("b"), opened("a", 12)
    border = decoded.decoded(split(), lambda: "a", 16, "paper")
    assert len(calls) == held() == 4
    assert (border[8, :, :, 0] == 255).all()  # 24 wide, 60 high: white beside
    assert not (opened()[8, :, :, 0] == 255).all()


def test_what_is_small_is_not_kept(monkeypatch: pytest.MonkeyPatch, all_is_large: Path) -> None:
    monkeypatch.setattr(decoded, "KEPT_FROM_BYTES", 9 * 3 * 16**2 + 1)
    pixels = decoded.decoded(split(), lambda: pytest.fail("the digest of a small split is not needed"), 16)
    assert np.array_equal(pixels, decode_all(PICTURES, 16))
    assert not isinstance(pixels, np.memmap)
    assert not all_is_large.exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped", "misnamed", "unsealed", "gone"])
def test_what_is_not_as_it_was_written_is_made_anew(
    damage: str, monkeypatch: pytest.MonkeyPatch, all_is_large: Path
) -> None:
    whole = np.array(opened())
    opened("b", pictures=PICTURES[::-1])
    one, other = sorted(all_is_large.glob("*.npy"), key=os.path.getmtime)
    if damage == "flipped":
        bytes_ = bytearray(one.read_bytes())
        bytes_[-1] ^= 1
        one.write_bytes(bytes_)
    elif damage == "truncated":
        one.write_bytes(one.read_bytes()[:-100])
    elif damage == "swapped":
        shutil.copy(other, one)
    elif damage == "misnamed":
        one.write_bytes(other.read_bytes())
        mine, theirs = (json.loads(path.with_suffix(".json").read_text()) for path in (one, other))
        one.with_suffix(".json").write_text(json.dumps(mine | {"files": theirs["files"]}))
    elif damage == "unsealed":
        one.with_suffix(".json").unlink()
    else:
        one.unlink()
    calls = counted(monkeypatch)
    assert np.array_equal(opened(), whole)
    assert calls == [9]


def test_a_killed_decoding_leaves_nothing_that_counts(monkeypatch: pytest.MonkeyPatch, all_is_large: Path) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Split, "decode_into", killed)
        with pytest.raises(KeyboardInterrupt):
            opened()
    (all_is_large / ".tmp-left").write_bytes(b"of one that was killed")
    assert held() == 0
    assert np.array_equal(opened(), decode_all(PICTURES, 16))
    assert not (all_is_large / ".tmp-left").exists()


def test_an_image_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [*PICTURES[:6], b"<html>", b"also not", PICTURES[8]]
    with pytest.raises(IntegrityError, match=r"birds/test: 6\.png: cannot be decoded \(format.*rog tasks lists"):
        opened(pictures=broken)
    assert held() == 0


def test_those_go_that_were_not_used_for_longest(monkeypatch: pytest.MonkeyPatch, all_is_large: Path) -> None:
    opened("a"), opened("b"), opened("c")
    by_age = sorted(all_is_large.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(by_age):
        os.utime(path, (1000 + age, 1000 + age))
    opened("a")
    array = by_age[0].with_suffix(".npy").stat().st_size
    monkeypatch.setenv("ROG_DECODED_GIB", str(3.5 * array / 2**30))
    opened("d")
    assert by_age[0].exists()
    assert not by_age[1].exists()
    assert not by_age[1].with_suffix(".npy").exists()
    assert by_age[2].exists()
    assert held() == 3


def test_a_disk_without_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(UsageError, match=r"images decoded take 0\.0 GiB; 0\.0 are free, 256\.0 allowed; set"):
            opened()
    monkeypatch.setenv("ROG_DECODED_GIB", "0")
    with pytest.raises(UsageError, match=r"are free, 0\.0 allowed; set ROG_CACHE to .* or ROG_DECODED_GIB higher"):
        opened()
    monkeypatch.setenv("ROG_DECODED_GIB", "many")
    with pytest.raises(UsageError, match="ROG_DECODED_GIB=many: give a number of GiB"):
        opened()


def test_all_of_it_can_be_forgotten(all_is_large: Path) -> None:
    decoded.forget_decoded()
    opened("a"), opened("b")
    decoded.forget_decoded()
    assert [path.name for path in all_is_large.iterdir()] == [".lock"]


@pytest.fixture
def birds(tmp_path: Path) -> ImageSet:
    folder = tmp_path / "set"
    with ImageSetWriter(
        folder, task="birds", source="retrieved", key="k", class_names=["owl", "gull"], config={}
    ) as writer:
        for row, image in enumerate(PICTURES):
            writer.add(key=f"p{row}", label=row % 2, caption="", origin={}, query="", image=image)
        writer.finish()
    table = read_table(folder / "candidates.parquet").to_pandas()
    table["status"], table["rank"] = "kept", range(len(table))
    import pyarrow as pa

    from retrieve_or_generate.image_set import MANIFEST

    seal_image_set(folder, pa.Table.from_pandas(table, MANIFEST, preserve_index=False))
    return load_image_set(folder)


def test_of_a_set_the_images_asked_for_in_their_order(birds: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoded_set(birds, 16)
    drawn = whole.drawn(["p5", "p0", "p3"])
    assert isinstance(drawn.images, Chosen)
    assert drawn.keys == ("p5", "p0", "p3")
    assert drawn.labels.tolist() == [1, 0, 1]
    assert np.array_equal(np.asarray(drawn.images), decode_all([PICTURES[row] for row in (5, 0, 3)], 16))
    calls = counted(monkeypatch)
    assert len(decoded_set(birds, 16, keys=["p5", "p0", "p3"]).pixels) == 9  # kept of all
    for module in (decoded, data):
        monkeypatch.setattr(module, "KEPT_FROM_BYTES", 3 * 3 * 16**2 + 1)
    few = decoded_set(birds, 16, keys=["p5", "p0", "p3"])
    assert calls == [3]
    assert np.array_equal(few.drawn(["p0", "p5"]).images, np.asarray(drawn.images)[[1, 0]])


def test_a_set_whose_image_is_gone_or_damaged_says_which(birds: ImageSet) -> None:
    shard = birds.folder / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(PICTURES[4], b"x" * len(PICTURES[4])))
    with pytest.raises(IntegrityError, match=r"set: p4: cannot be decoded \(format: .*\)$"):
        decoded_set(birds, 16)


def test_a_task_is_shown_as_training_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its splits and shifts at the model's size, with borders where those have them."""
    reader = SimpleNamespace(read=split)
    task = SimpleNamespace(
        split=lambda _: split(),
        shift=lambda _: split(),
        shifts={"drawn": reader},
        class_names=("owl",),
        templates=("a {}",),
    )
    clip = make_clip()
    whole = data.task_images(task, clip, "paper")  # type: ignore[arg-type]
    for images in (whole.train, whole.val, whole.test, whole.shifts["drawn"]):
        assert np.array_equal(images.images, decode_all(PICTURES, 32, "paper"))
    assert not np.array_equal(whole.test.images, data.task_images(task, clip).test.images)  # type: ignore[arg-type]
