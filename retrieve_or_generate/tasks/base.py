"""The contract of a task: class names, templates and three splits, read from the webdataset layout of CLIP_benchmark.

A task folder holds `{train,val,test}/{nshards.txt,0.tar,…}` with an image and a `.cls` for every key, `classnames.txt`,
`zeroshot_classification_templates.txt` (`{c}` or `{}` stands for the name) and, where wanted, three files of ours: `synonyms.tsv`
(name, tab, synonym), `queries.tsv` (what captions must say of a class: `tasks.queries`) and `wnids.txt` (ids of WordNet as ImageNet
has them, a line for each of `classnames.txt`). Class ids are line numbers of `classnames.txt`, never the order of folders.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.store import content_key, sha256_of
from retrieve_or_generate.tasks.queries import CaptionQuery, read_queries, read_text

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Split:
    """`keys` and encoded `images` in file order, and their `labels` (n,) int64."""

    keys: tuple[str, ...]
    images: tuple[bytes, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Task:
    """What CLIP is adapted to. `templates` have "{}" where the class name goes."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    folder: Path
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rewrites: dict[str, CaptionQuery] = field(default_factory=dict)
    wnids: tuple[str, ...] = ()

    def split(self, name: SplitName) -> Split:
        """Read one split; `IntegrityError` names the file that is missing or damaged, or holds a label out of range."""
        return read_split(self.folder / name, len(self.class_names))

    @cached_property
    def caption_queries(self) -> dict[int, CaptionQuery]:
        """What captions must say, by label: the class name where `queries.tsv` says nothing of the class."""
        return {
            label: self.rewrites.get(name) or CaptionQuery.any_of([name]) for label, name in enumerate(self.class_names)
        }

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over class names, templates, rewritten caption queries and every file of the three splits."""
        files = [sha256_of(path) for split in SPLITS for path in _shards(self.folder / split)]
        rewrites = [{name: query.lines for name, query in self.rewrites.items()}] if self.rewrites else []
        return content_key([self.class_names, self.templates, files, *rewrites])


def _shards(folder: Path) -> list[Path]:
    """The tars that `nshards.txt` announces; without it, all there are."""
    count = folder / "nshards.txt"
    if count.is_file():
        text = count.read_text().strip()
        if not text.isdigit():
            raise IntegrityError(f"{count}: {text[:40]!r} is not a number of shards")
        paths = [folder / f"{i}.tar" for i in range(int(text))]
    else:
        paths = sorted(folder.glob("*.tar"))
    for path in paths:
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; {count} announces {len(paths)} shards")
    if not paths:
        raise UsageError(f"{folder}: no webdataset shards (0.tar, 1.tar, …) of this split")
    return paths


def read_split(folder: Path, classes: int) -> Split:
    """All samples of a split. Members are streamed, never unpacked to disk."""
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    for path in _shards(folder):
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    key, dot, suffix = member.name.partition(".")
                    file = tar.extractfile(member) if member.isreg() else None
                    if file is None:
                        continue
                    if dot + suffix.lower() in _IMAGE_SUFFIXES:
                        images[key] = file.read()
                    elif suffix == "cls":
                        labels[key] = _label(file.read(), classes, f"{path}: {member.name}")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise IntegrityError(f"{path}: not a whole tar ({error})") from error
    if images.keys() != labels.keys() or not images:
        odd = sorted(images.keys() ^ labels.keys())[:3]
        raise IntegrityError(
            f"{folder}: {len(images)} images but {len(labels)} labels (first without its partner: {odd})"
        )
    keys = tuple(images)
    return Split(keys, tuple(images.values()), np.array([labels[key] for key in keys], np.int64))


def _label(data: bytes, classes: int, where: str) -> int:
    text = data.decode(errors="replace").strip()
    if not text.isdigit() or int(text) >= classes:
        raise IntegrityError(f"{where}: label {text[:20]!r} is not a class id below {classes}")
    return int(text)


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UsageError(f"{path}: missing; a task folder needs it (layout: CLIP_benchmark webdataset)")
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


def read_task(folder: Path, name: str | None = None) -> Task:
    """The task in `folder`; `UsageError` when it has under two classes, two of the same name, or no template for them."""
    class_names = _lines(folder / "classnames.txt")
    if len(class_names) < 2:
        raise UsageError(f"{folder}: {len(class_names)} class; a task needs two or more")
    repeated = sorted({n for n in class_names if class_names.count(n) > 1})
    if repeated:
        raise UsageError(
            f"{folder / 'classnames.txt'}: {repeated[0]!r} stands there twice; give each class a name of its own"
        )
    templates = _templates(folder / "zeroshot_classification_templates.txt")
    synonyms = _synonyms(folder / "synonyms.tsv")
    queries = folder / "queries.tsv"
    rewrites = read_queries(queries, class_names, synonyms) if queries.is_file() else {}
    return Task(name or folder.name, class_names, templates, folder, synonyms, rewrites, _wnids(folder, class_names))


def _templates(path: Path) -> tuple[str, ...]:
    """What is said around a class name, which stands at `{}`."""
    templates = tuple(line.replace("{c}", "{}") for line in _lines(path))
    if not templates:
        raise UsageError(f"{path}: no template; put one a line, such as: a photo of a {{c}}.")
    nameless = [template for template in templates if "{}" not in template]
    if nameless:
        raise UsageError(f"{path}: {nameless[0][:80]!r} has no {{c}}, where the class name goes")
    return templates


def _wnids(folder: Path, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes' synsets in WordNet 3.0, in their order; none where there is no file."""
    path = folder / "wnids.txt"
    wnids = _lines(path) if path.is_file() else ()
    if wnids and len(wnids) != len(class_names):
        raise UsageError(
            f"{path}: {len(wnids)} ids for {len(class_names)} classes; give each class a line, in their order"
        )
    for wnid in wnids:
        if not re.fullmatch(r"n\d{8}", wnid):
            raise UsageError(f"{path}: {wnid[:40]!r} is no WordNet id, such as n02012849")
    return wnids


def _synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Other names of classes, in file order; none where there is no file."""
    synonyms: dict[str, tuple[str, ...]] = {}
    for line in _lines(path) if path.is_file() else ():
        known, _, word = (part.strip() for part in line.partition("\t"))
        if not word:
            raise UsageError(f"{path}: no synonym after {known!r}; a line is a class name, a tab and one synonym")
        synonyms[known] = (*synonyms.get(known, ()), word)
    return synonyms
