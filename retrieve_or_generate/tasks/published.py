"""The five tasks of "The Unmet Promise" (arXiv 2406.05184), read from the user's own files with the paper's splits.

torchvision's readers say which image is of which split and class; labels are matched by name (ImageNet's by WordNet id). Nothing is
downloaded or unpacked. `--data FOLDER` or the variable ROG_DATA names the folder that holds them, each in torchvision's layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.tasks.base import SplitName, Task
from retrieve_or_generate.tasks.image_folder import ImageFolders
from retrieve_or_generate.tasks.imagenet import RENAMED, imagenet_names, imagenet_wnids
from retrieve_or_generate.tasks.layout import HeldOut, Labelled, Listing
from retrieve_or_generate.tasks.split import ImageFiles, Reader
from retrieve_or_generate.tasks.templates import clip_imagenet_templates
from retrieve_or_generate.tasks.words import checked_names

DATA = "ROG_DATA"
_IMAGENET_VAL = 50_000
Readers = dict[SplitName, Reader]


@dataclass(frozen=True)
class Published:
    """What is known of a published task before its files are read.

    `sizes` are images of train, val and test; `folder` lies in the data folder and must hold `needs`; `fetch` says in one line what
    to get and how to lay it out, with {folder} for where; `read` gives the task.
    """

    title: str
    classes: int
    sizes: tuple[int, int, int]
    folder: str
    needs: tuple[str, ...]
    fetch: str
    read: Callable[[str, Path], Task]

    def place(self) -> Path | None:
        """Where its files lie; None where they are not all there, or no data folder is named."""
        root = os.environ.get(DATA)
        folder = Path(root) / self.folder if root else None
        return folder if folder and all((folder / name).exists() for name in self.needs) else None

    def task(self, name: str) -> Task:
        """`UsageError` says which files are missing, and how to lay out what has to be fetched by hand."""
        folder = self.place()
        if folder:
            return self.read(name, folder)
        if not os.environ.get(DATA):
            wanted = f"name the folder with your data sets by --data FOLDER or {DATA}"
            raise UsageError(
                f"task {name} is read from files of yours; {wanted}. {self.fetch.format(folder=self.folder)}"
            )
        folder = Path(os.environ[DATA]) / self.folder
        missing = next(needed for needed in self.needs if not (folder / needed).exists())
        raise UsageError(f"task {name}: {folder / missing}: not there. {self.fetch.format(folder=folder)}")


@dataclass(frozen=True)
class TorchvisionLists:
    """A data set of torchvision as a layout: `open` gives the one of a split, `listed` its paths, labels and class names, `found`
    where the image of such a path lies.
    """

    folder: Path
    open: Callable[[str], Any]
    listed: Callable[[Any], tuple[Sequence[Any], Sequence[int], Sequence[str]]]
    every_class: bool = True
    found: Callable[[Path], Path] = lambda path: path

    @property
    def where(self) -> str:
        return str(self.folder)

    def splits(self) -> list[str]:
        return ["train", "val", "test"]

    def labels(self, split: str) -> Sequence[str]:
        return self.listing(split).names

    def listing(self, split: str) -> Listing:
        try:
            paths, labels, names = self.listed(self.open(split))
        except (
            Exception
        ) as error:  # readers of text, of .mat files and of their compressed parts answer damage with many types
            raise IntegrityError(
                f"{self.folder}: torchvision cannot read split {split} ({_in_a_line(error)})"
            ) from error
        codes = np.array(labels, np.int64)
        if odd := np.flatnonzero((codes < 0) | (codes >= len(names))).tolist():
            raise IntegrityError(
                f"{self.folder}/{split}: {paths[odd[0]]}: label {codes[odd[0]]} is not a class id below {len(names)}"
            )
        files = [str(self.found(Path(path))) for path in paths]
        if missing := [path for path in files if not Path(path).exists()]:
            raise IntegrityError(f"{missing[0]}: missing; {len(missing)} of {len(files)} images of {split} are")
        keys = [os.path.relpath(path, self.folder).replace(os.sep, "/") for path in paths]
        return Listing(keys, ImageFiles(files), codes, names)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _listed_task(
    name: str, layout: TorchvisionLists, templates: Sequence[str], split: Callable[[Labelled], Readers], *notes: str
) -> Task:
    """A task whose class names are those of its training images; `split` makes its splits of these."""
    names = checked_names(layout.labels("train"), str(layout.folder))
    train = Labelled(layout, "train", {known: place for place, known in enumerate(names)})
    return Task(name, names, tuple(templates), layout.folder, readers=split(train), notes=notes)


def _as_published(train: Labelled) -> Readers:
    """Three splits that the data set has."""
    return {
        "train": train,
        "val": Labelled(train.layout, "val", train.ids),
        "test": Labelled(train.layout, "test", train.ids),
    }


def _dtd(name: str, folder: Path) -> Task:
    from torchvision.datasets import DTD

    root = folder.parents[1]
    layout = TorchvisionLists(
        folder,
        lambda split: DTD(root, split, partition=1),
        lambda data: (data._image_files, data._labels, data.classes),
    )
    nouns, articles = ("texture", "pattern", "thing", "object"), ("a", "{a}", "the")
    templates = [f"a photo of {article} {{}} {noun}." for article in articles for noun in nouns]
    return _listed_task(name, layout, templates, _as_published, "fold 1 of ten")


def _aircraft(name: str, folder: Path) -> Task:
    from torchvision.datasets import FGVCAircraft

    layout = TorchvisionLists(
        folder,
        lambda split: FGVCAircraft(folder.parent, split, annotation_level="variant"),
        lambda data: (data._image_files, data._labels, data.classes),
    )
    templates = ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft.")
    return _listed_task(name, layout, templates, _as_published, "classes are variants")


_FLOWERS = {"globe-flower": "globe flower", "pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"}
"""What torchvision calls a flower, and what CLIP's prompts do."""


def _flowers(name: str, folder: Path) -> Task:
    from torchvision.datasets import Flowers102

    layout = TorchvisionLists(
        folder,
        lambda split: Flowers102(folder.parent, split),
        lambda data: (data._image_files, data._labels, [_FLOWERS.get(flower, flower) for flower in data.classes]),
    )
    templates = ("a photo of a {}, a type of flower.", "a photo of {a} {}, a type of flower.")
    return _listed_task(name, layout, templates, _as_published)


def _cars(name: str, folder: Path) -> Task:
    from torchvision.datasets import StanfordCars

    def listed(data: Any) -> tuple[list[str], list[int], list[str]]:
        return [path for path, _ in data._samples], [int(label) for _, label in data._samples], data.classes

    def split(train: Labelled) -> Readers:
        held = (0.2,)
        return {
            "train": HeldOut(train, held, 0),
            "val": HeldOut(train, held, 1),
            "test": Labelled(train.layout, "test", train.ids),
        }

    layout = TorchvisionLists(folder, lambda split: StanfordCars(folder.parent, split), listed, found=_once_more)
    templates = [
        f"a photo of {which} {{}}."
        for which in ("a", "{a}", "the", *("my", "my dirty", "my clean", "my new", "my old"))
    ]
    note = "val: a fifth of the training images, as random_split draws it with seed 42"
    return _listed_task(name, layout, [*templates, "i love my {}!"], split, note)


def _once_more(path: Path) -> Path:
    """cars_train/00001.jpg, or where Kaggle's archive has it: cars_train/cars_train/00001.jpg."""
    within = path.parent / path.parent.name
    return within / path.name if within.is_dir() else path


def _imagenet(name: str, folder: Path) -> Task:
    ids = {wnid: place for place, wnid in enumerate(imagenet_wnids())}
    layout = ImageFolders(folder)
    train, held = Labelled(layout, "train", ids), (_IMAGENET_VAL,)
    readers: Readers = {
        "train": HeldOut(train, held, 0),
        "val": HeldOut(train, held, 1),
        "test": Labelled(layout, "val", ids),
    }
    renamed = [
        f"class {label} is {ours!r} here, which CLIP's list calls {theirs!r} as it does another class"
        for label, (theirs, ours) in RENAMED.items()
    ]
    notes = (
        *renamed,
        f"val: {_IMAGENET_VAL} of the training images, as random_split draws them with seed 42; test: the official val",
    )
    return Task(
        name, imagenet_names(), clip_imagenet_templates(), folder, wnids=tuple(ids), readers=readers, notes=notes
    )


PUBLISHED: dict[str, Published] = {
    "imagenet": Published(
        "ImageNet-1K (ILSVRC 2012)",
        1000,
        (1_231_167, 50_000, 50_000),
        "imagenet",
        ("train", "val"),
        "From image-net.org, where you register: put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz in {folder}; torchvision.datasets.ImageNet unpacks them once to "
        "{folder}/train/n01440764/… and {folder}/val/n01440764/…, 1000 folders each",
        _imagenet,
    ),
    "dtd": Published(
        "Describable Textures, fold 1",
        47,
        (1880, 1880, 1880),
        "dtd/dtd",
        ("images", "labels"),
        "Fetch dtd-r1.0.1.tar.gz from www.robots.ox.ac.uk/~vgg/data/dtd and unpack it so that {folder}/images/banded/… and "
        "{folder}/labels/train1.txt are there",
        _dtd,
    ),
    "fgvc-aircraft": Published(
        "FGVC-Aircraft, variants",
        100,
        (3334, 3333, 3333),
        "fgvc-aircraft-2013b",
        ("data/images", "data/variants.txt"),
        "Fetch fgvc-aircraft-2013b.tar.gz from www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft and unpack it so that "
        "{folder}/data/images/0034309.jpg and {folder}/data/images_variant_train.txt are there",
        _aircraft,
    ),
    "stanford-cars": Published(
        "Stanford Cars",
        196,
        (6516, 1628, 8041),
        "stanford_cars",
        (
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
            "cars_train",
            "cars_test",
        ),
        "Its first address is gone; of a copy put {folder}/cars_train/00001.jpg, {folder}/cars_test/00001.jpg (or each a folder "
        "of its own name deeper, as in Kaggle's archive), "
        "{folder}/devkit/cars_meta.mat, {folder}/devkit/cars_train_annos.mat and {folder}/cars_test_annos_withlabels.mat",
        _cars,
    ),
    "flowers102": Published(
        "Oxford Flowers-102",
        102,
        (1020, 1020, 6149),
        "flowers-102",
        ("jpg", "imagelabels.mat", "setid.mat"),
        "Fetch 102flowers.tgz, imagelabels.mat and setid.mat from www.robots.ox.ac.uk/~vgg/data/flowers/102 so that "
        "{folder}/jpg/image_00001.jpg, {folder}/imagelabels.mat and {folder}/setid.mat are there",
        _flowers,
    ),
}
