"""The paper's five tasks: splits as torch draws them, labels by name, names and templates as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torch.utils.data import random_split
from torchvision.datasets import Flowers102, StanfordCars

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.tasks import load_task
from retrieve_or_generate.tasks.imagenet import distinct_names, imagenet_names, imagenet_wnids
from retrieve_or_generate.tasks.published import PUBLISHED
from retrieve_or_generate.tasks.templates import as_functions, filled
from tests.tasks import miniatures

MADE = {
    "dtd": "dtd",
    "fgvc-aircraft": "fgvc_aircraft",
    "stanford-cars": "stanford_cars",
    "flowers102": "flowers102",
    "imagenet": "imagenet",
}


@pytest.mark.parametrize(
    ("name", "count"), [("dtd", 12), ("fgvc-aircraft", 2), ("stanford-cars", 9), ("flowers102", 2), ("imagenet", 80)]
)
def test_templates_are_as_many_as_the_paper_has(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = load_task(miniatures.KINDS[MADE[name]](tmp_path, monkeypatch)).templates
    assert len(set(templates)) == len(templates) == count
    said = [template("Audi TT") for template in as_functions(templates)]
    assert not [text for text in said if "{" in text or "Audi TT" not in text]


def test_the_article_is_that_of_the_name() -> None:
    assert filled("a photo of {a} {}.", "owl") == "a photo of an owl."
    assert filled("a photo of {a} {}.", "HUMMER H2") == "a photo of a HUMMER H2."
    assert filled("a photo of a {}.", "owl") == "a photo of a owl.", "as CLIP's own prompts say it"


def test_cars_train_is_cut_as_torch_cuts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(miniatures.stanford_cars(tmp_path, monkeypatch))
    data = StanfordCars(tmp_path, "train")
    parts = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(42))
    for name, part in zip(("train", "val"), parts, strict=True):
        drawn = {(Path(data._samples[row][0]).name, int(data._samples[row][1])) for row in part.indices}
        split = task.split(name)  # type: ignore[arg-type]
        assert {(Path(key).name, label) for key, label in zip(split.keys, split.labels.tolist(), strict=True)} == drawn
    assert [len(task.split(name)) for name in ("train", "val", "test")] == [12, 3, 3]


def test_cars_a_folder_deeper_as_in_kaggles_archive_are_the_same_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_task(miniatures.stanford_cars(tmp_path, monkeypatch)).fingerprint
    for split in ("train", "test"):
        folder = tmp_path / f"stanford_cars/cars_{split}"
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (tmp_path / "moved").rename(folder / folder.name)
    task = load_task("stanford-cars")
    assert task.fingerprint == plain
    (tmp_path / "stanford_cars/cars_test/cars_test/00002.jpg").unlink()
    with pytest.raises(IntegrityError, match=r"cars_test/00002.jpg: missing; 1 of 3 images of test are"):
        load_task("stanford-cars").split("test")


def test_the_sizes_that_are_published_are_those_of_the_cuts() -> None:
    cars = random_split(range(8144), [0.8, 0.2], generator=torch.Generator().manual_seed(42))  # type: ignore[arg-type,var-annotated]
    assert PUBLISHED["stanford-cars"].sizes[:2] == tuple(map(len, cars))
    assert PUBLISHED["imagenet"].sizes[0] + PUBLISHED["imagenet"].sizes[1] == 1_281_167


def test_imagenet_holds_out_of_train_and_is_tested_on_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(miniatures.imagenet(tmp_path, monkeypatch))
    assert [len(task.split(name)) for name in ("train", "val", "test")] == [6, 4, 5]
    assert task.class_names == ("tench", "missile", "projectile", "sunglass", "sunglasses")
    for name in ("train", "val", "test"):
        split = task.split(name)  # type: ignore[arg-type]
        assert [task.wnids[label] for label in split.labels] == [key.split("/")[0] for key in split.keys]
    assert "class 744 is 'projectile' here" in "\n".join(task.notes)


def test_imagenet_has_a_thousand_names_and_ids() -> None:
    from open_clip import IMAGENET_CLASSNAMES

    names, wnids = imagenet_names(), imagenet_wnids()
    assert len(set(names)) == len(set(wnids)) == 1000
    assert [place for place in range(1000) if names[place] != IMAGENET_CLASSNAMES[place]] == [744, 836]
    assert [wnids[place] for place in (657, 744, 836, 837)] == ["n03773504", "n04008634", "n04355933", "n04356056"]
    assert list(wnids) == sorted(wnids)
    assert distinct_names(IMAGENET_CLASSNAMES[:900]) == tuple(IMAGENET_CLASSNAMES[:900])


def test_clip_benchmarks_imagenet_has_its_repeats_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import IMAGENET_CLASSNAMES

    folder = miniatures.clip_benchmark(tmp_path, monkeypatch)
    (tmp_path / "classnames.txt").write_text("\n".join(IMAGENET_CLASSNAMES))
    assert load_task(folder).class_names == imagenet_names()


def test_flowers_are_called_as_in_clips_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load_task(miniatures.flowers102(tmp_path, monkeypatch)).class_names
    assert len(names) == 102
    assert {ours for ours, theirs in zip(names, Flowers102.classes, strict=True) if ours != theirs} == {
        "globe flower",
        "pink and yellow dahlia",
        "air plant",
    }


def test_an_empty_class_shifts_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code took folders in the order of the alphabet: one without images, and all later labels were wrong."""
    miniatures.dtd(tmp_path, monkeypatch)
    listed = tmp_path / "dtd/dtd/labels/test1.txt"
    listed.write_text("".join(line for line in listed.read_text().splitlines(True) if not line.startswith("banded")))
    with pytest.raises(UsageError, match=r"dtd/dtd/test: no image .* of class 'banded'"):
        load_task("dtd").split("test")
    train = load_task("dtd").split("train")
    assert np.bincount(train.labels).tolist() == [4, 2, 3]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("dtd", "dtd/dtd/labels/val1.txt", "torchvision cannot read split val .FileNotFoundError"),
        (
            "dtd",
            "dtd/dtd/images/banded/banded_val0000.jpg",
            r"banded_val0000.jpg: missing; 1 of 4 images of val are",
        ),
        ("fgvc-aircraft", "fgvc-aircraft-2013b/data/images_variant_val.txt", "torchvision cannot read split val"),
        ("flowers102", "flowers-102/setid.mat", r"setid.mat: not there\. Fetch 102flowers.tgz"),
    ],
)
def test_what_is_missing_is_named(
    name: str, damage: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniatures.KINDS[MADE[name]](tmp_path, monkeypatch)
    (tmp_path / damage).unlink()
    with pytest.raises(UsageError, match=message):
        load_task(name).split("val")


def test_damaged_lists_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniatures.stanford_cars(tmp_path, monkeypatch)
    path = tmp_path / "stanford_cars/cars_test_annos_withlabels.mat"
    whole = path.read_bytes()
    for data in (b"", b"<html>" * 100, whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"stanford_cars: torchvision cannot read split test \(") as raised:
            load_task("stanford-cars").split("test")
        assert "\n" not in str(raised.value)


def test_a_label_of_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniatures.stanford_cars(tmp_path, monkeypatch)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)
    scipy.io.savemat(tmp_path / "stanford_cars/devkit/cars_meta.mat", {"class_names": names})
    with pytest.raises(IntegrityError, match=r"cars_train/00003\.jpg: label 2 is not a class id below 2"):
        load_task("stanford-cars").split("test")


def test_a_file_with_another_checksum_than_torchvision_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniatures.flowers102(tmp_path, monkeypatch)
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, "label": ("imagelabels.mat", "0" * 32)})
    with pytest.raises(
        IntegrityError, match=r"torchvision cannot read split train \(RuntimeError: Dataset not found or corrupted"
    ):
        load_task("flowers102")


def test_an_imagenet_folder_that_is_missing_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniatures.imagenet(tmp_path, monkeypatch)
    (tmp_path / "imagenet/val/n01440764").rename(tmp_path / "imagenet/val/n99999999")
    with pytest.raises(UsageError, match=r"n99999999/n01440764_0.JPEG: unknown class 'n99999999'"):
        load_task("imagenet").split("test")
    (tmp_path / "imagenet/val/n99999999").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"imagenet/val: no image .* of class 'n01440764'"):
        load_task("imagenet").split("test")


def test_nothing_is_downloaded_or_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in MADE.items():
        folder = tmp_path / name
        load = miniatures.KINDS[kind](folder, monkeypatch)
        before = sorted(folder.rglob("*"))
        load_task(load).split("train")
        assert sorted(folder.rglob("*")) == before
