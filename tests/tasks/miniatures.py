"""A small copy of every layout that a task is read from. Each function writes one as its publisher does and gives its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from torchvision.datasets import Flowers102

from retrieve_or_generate.pixels import encode_jpeg, encode_png
from retrieve_or_generate.store import write_tar
from retrieve_or_generate.tasks import published
from retrieve_or_generate.tasks.imagenet import RENAMED, imagenet_names, imagenet_wnids

NAMES = ("grey heron", "mute swan", "owl/eagle-owl")
COUNTS = {"train": (4, 2, 3), "val": (1, 2, 1), "test": (2, 1, 2)}
TEMPLATES = ("a photo of a {}.", "a drawing of {a} {}.")


def pictures() -> Iterator[bytes]:
    """Small pictures, no two of them the same: decoders do not read what follows the end of a JPEG."""
    rng = np.random.default_rng(0)
    base = encode_jpeg(rng.integers(0, 256, (12, 10, 3), np.uint8))
    return (base + number.to_bytes(4, "big") for number in range(10**6))


def rows(split: str, drawn: Iterator[bytes]) -> list[tuple[int, bytes]]:
    return [(label, next(drawn)) for label, count in enumerate(COUNTS[split]) for _ in range(count)]


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def task_yaml(folder: Path, text: str = "") -> str:
    lines = "".join(f"\n- {template!r}" for template in TEMPLATES)
    write(folder / "task.yaml", f"templates:{lines}\n{text}")
    return str(folder)


def clip_benchmark(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Two shards a split, keys that begin anew in each, a PNG among the JPEGs."""
    drawn = pictures()
    for split in COUNTS:
        mine = rows(split, drawn)
        for shard in range(2):
            part = [(f"s{i:07d}", label, data) for i, (label, data) in enumerate(mine[shard::2])]
            members = [
                (f"{key}.{kind}", data)
                for key, label, jpg in part
                for kind, data in (("cls", str(label).encode()), ("jpg", jpg))
            ]
            write_tar(folder / split / f"{shard}.tar", members)
        write(folder / split / "nshards.txt", "2")
    write(folder / "classnames.txt", "\n".join(NAMES))
    write(folder / "zeroshot_classification_templates.txt", "\n".join(t.replace("{}", "{c}") for t in TEMPLATES))
    return str(folder)


def image_folder(folder: Path, patch: pytest.MonkeyPatch) -> str:
    drawn = pictures()
    for split in COUNTS:
        for place, (label, data) in enumerate(rows(split, drawn)):
            write(folder / split / NAMES[label].replace("/", "_") / f"{place}.JPG", data)
    return task_yaml(folder, f"classes: {list(NAMES)}")


def image_folder_held_out(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """One tree without splits."""
    drawn = pictures()
    for label, name in enumerate(NAMES):
        for place in range(20 - label):
            write(folder / "birds" / name.replace("/", "_") / f"{place:02d}.jpg", next(drawn))
    return task_yaml(folder, "data: birds\ntrain: .\nval: 0.2\ntest: 0.3")


def image_tar(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """One tar with everything below a folder of its own."""
    drawn, members = pictures(), []
    for split in COUNTS:
        for place, (label, data) in enumerate(rows(split, drawn)):
            members.append((f"birds/{split}/{NAMES[label].replace('/', '_')}/{place}.JPG", data))
    write_tar(folder / "birds.tar", members[::-1])
    return task_yaml(folder, f"data: birds.tar\nclasses: {list(NAMES)}")


def tar_of_each_split(folder: Path, patch: pytest.MonkeyPatch) -> str:
    drawn = pictures()
    for split in COUNTS:
        named = [
            (f"./{NAMES[label].replace('/', '_')}/{place}.JPG", data)
            for place, (label, data) in enumerate(rows(split, drawn))
        ]
        write_tar(folder / f"{split}.tar", named)
    return task_yaml(folder, f"classes: {list(NAMES)}")


def _data_set(split: str, drawn: Iterator[bytes]) -> Any:
    from datasets import ClassLabel, Dataset, Features, Image

    mine = rows(split, drawn)
    columns = {"image": [{"bytes": data, "path": None} for _, data in mine], "label": [label for label, _ in mine]}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=list(NAMES))}))


def hugging_face(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """As save_to_disk leaves it; the validation split has the Hub's name."""
    from datasets import DatasetDict

    drawn, called = pictures(), {"train": "train", "val": "validation", "test": "test"}
    data = DatasetDict({called[split]: _data_set(split, drawn) for split in COUNTS})
    data.save_to_disk(str(folder / "birds"), num_shards=dict.fromkeys(data, 2))
    return task_yaml(folder, "data: birds")


def hub_parquet(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """As a repository of the Hub holds it."""
    drawn, called = pictures(), {"train": "train", "val": "validation", "test": "test"}
    (folder / "data").mkdir(parents=True)
    for split in COUNTS:
        _data_set(split, drawn).to_parquet(str(folder / f"data/{called[split]}-00000-of-00001.parquet"), batch_size=2)
    return task_yaml(folder)


def parquet_of_paths(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """One table whose column says of which split a row is, labels in words."""
    drawn, table = pictures(), []
    for split in COUNTS:
        for place, (label, data) in enumerate(rows(split, drawn)):
            write(folder / "images" / f"{split}-{place}.png", data)
            table.append({"path": f"images/{split}-{place}.png", "label": NAMES[label], "fold": split})
    pq.write_table(pa.Table.from_pylist(table), folder / "birds.parquet")
    return task_yaml(folder, "data: birds.parquet\nsplit: fold")


def dtd(folder: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("ROG_DATA", str(folder))
    drawn, names = pictures(), ("banded", "dotted", "polka-dotted")
    for split in COUNTS:
        lines = []
        for place, (label, data) in enumerate(rows(split, drawn)):
            lines.append(f"{names[label]}/{names[label]}_{split}{place:04d}.jpg")
            write(folder / "dtd/dtd/images" / lines[-1], data)
        write(folder / f"dtd/dtd/labels/{split}1.txt", "\n".join(lines) + "\n")
    return "dtd"


def fgvc_aircraft(folder: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("ROG_DATA", str(folder))
    drawn, names, number = pictures(), ("707-320", "A300B4", "F/A-18"), 34309
    data = folder / "fgvc-aircraft-2013b/data"
    for split in COUNTS:
        lines = []
        for label, image in rows(split, drawn):
            lines.append(f"{number:07d} {names[label]}")
            write(data / f"images/{number:07d}.jpg", image)
            number += 1
        write(data / f"images_variant_{split}.txt", "\n".join(lines) + "\n")
    write(data / "variants.txt", "\n".join(names) + "\n")
    return "fgvc-aircraft"


def stanford_cars(folder: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("ROG_DATA", str(folder))
    drawn, home = pictures(), folder / "stanford_cars"
    names = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012")
    for split, labels in {"train": [0, 1, 2] * 5, "test": [2, 1, 0]}.items():
        told = np.zeros(len(labels), [("fname", object), ("class", object)])
        for place, label in enumerate(labels):
            told[place] = (f"{place + 1:05d}.jpg", label + 1)
            write(home / f"cars_{split}/{place + 1:05d}.jpg", next(drawn))
        (home / "devkit").mkdir(exist_ok=True)
        place_of = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
        scipy.io.savemat(home / place_of[split], {"annotations": told})
    scipy.io.savemat(home / "devkit/cars_meta.mat", {"class_names": np.array(names, object)})
    return "stanford-cars"


def flowers102(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Each of the 102 classes once a split; the checksums that torchvision asks for are those of these files."""
    patch.setenv("ROG_DATA", str(folder))
    drawn, home = pictures(), folder / "flowers-102"
    for number in range(1, 307):
        write(home / f"jpg/image_{number:05d}.jpg", next(drawn))
    numbers = np.arange(1, 307)
    scipy.io.savemat(home / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    ids = {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]}
    scipy.io.savemat(home / "setid.mat", ids)
    files = {
        what: (name, hashlib.md5((home / name).read_bytes()).hexdigest())
        for what, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    patch.setattr(Flowers102, "_file_dict", files)
    return "flowers102"


def imagenet(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Five of the classes, among them those that share a name in CLIP's list."""
    wnids, names = imagenet_wnids(), imagenet_names()
    chosen = (0, *RENAMED, 657, 837)
    patch.setattr(published, "imagenet_wnids", lambda: tuple(wnids[place] for place in sorted(chosen)))
    patch.setattr(published, "imagenet_names", lambda: tuple(names[place] for place in sorted(chosen)))
    return _imagenet(folder, patch, [wnids[place] for place in chosen], held_out=4)


def whole_imagenet(folder: Path, patch: pytest.MonkeyPatch) -> str:
    return _imagenet(folder, patch, list(imagenet_wnids()), held_out=500)


def _imagenet(folder: Path, patch: pytest.MonkeyPatch, wnids: list[str], held_out: int) -> str:
    """Two training images and one of val in each folder."""
    patch.setenv("ROG_DATA", str(folder))
    patch.setattr(published, "_IMAGENET_VAL", held_out)
    drawn = pictures()
    for wnid in wnids:
        for split, count in (("train", 2), ("val", 1)):
            for place in range(count):
                write(folder / f"imagenet/{split}/{wnid}/{wnid}_{place}.JPEG", next(drawn))
    return "imagenet"


KINDS: dict[str, Callable[[Path, pytest.MonkeyPatch], str]] = {
    made.__name__: made
    for made in (
        *(clip_benchmark, image_folder, image_folder_held_out, image_tar, tar_of_each_split),
        *(hugging_face, hub_parquet, parquet_of_paths),
        *(dtd, fgvc_aircraft, stanford_cars, flowers102, imagenet, whole_imagenet),
    )
}

PNG = encode_png(np.zeros((8, 8, 3), np.uint8))
