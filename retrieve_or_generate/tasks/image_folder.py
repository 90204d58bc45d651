"""Folders of images: `SPLIT/CLASS/….jpg`, as torchvision's ImageFolder reads them, but by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.tasks.layout import Listing
from retrieve_or_generate.tasks.split import ImageFiles


@dataclass(frozen=True)
class ImageFolders:
    """A folder with a sub-folder for each split, in which each class has one. The split `.` is the folder itself."""

    folder: Path
    every_class: bool = True

    @property
    def where(self) -> str:
        return str(self.folder)

    def splits(self) -> list[str]:
        return _folders(self.folder)

    def labels(self, split: str) -> list[str]:
        folder = self.folder / split
        names = _folders(folder) if folder.is_dir() else []
        if not names:
            raise UsageError(f"{folder}: no class folders; an image of a class lies in {folder}/CLASS/")
        return names

    def listing(self, split: str) -> Listing:
        """In torchvision's order: by name of folder, then by path. A class folder without an image is listed among the names."""
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        folder, names = self.folder / split, self.labels(split)
        ids = {name: place for place, name in enumerate(names)}
        found = make_dataset(str(folder), ids, extensions=IMG_EXTENSIONS, allow_empty=True)
        paths = [path for path, _ in found]
        keys = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
        return Listing(keys, ImageFiles(paths), np.array([code for _, code in found], np.int64), names)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
