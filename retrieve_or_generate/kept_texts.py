"""Texts that models were asked for, kept in the cache folder: captioners and language models are slow, and are killed halfway."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.store import cache_folder, content_key, locked, read_json, sync_folder, write_json

CAPTIONS = "captions"
"""What models said of images, by the images' sha256."""


class KeptTexts:
    """JSON values by name that follow from `key` and their name alone.

    They lie in files that are written once, each called by the hash of what it says: one that is truncated or changed is
    another's, and what it held is made again. Several processes may read and add.
    """

    def __init__(self, what: str, key: str):
        self._folder = _shelf() / f"{what}-{key}"
        self._known: dict[str, Any] = {}
        self._seen: set[str] = set()

    @property
    def known(self) -> Mapping[str, Any]:
        """All there were when it was last read."""
        return self._known or self.read()

    def read(self) -> Mapping[str, Any]:
        """All there are, with what other processes added since."""
        for path in sorted(self._folder.glob("[0-9a-f]*.json")):
            if path.name not in self._seen:
                self._seen.add(path.name)
                self._known |= _checked(path)
        return self._known

    def add(self, texts: Mapping[str, Any]) -> None:
        """Keep these for good; they are on the disk when it returns."""
        name = f"{content_key(texts)}.json"
        write_json(self._folder / name, texts)
        self._seen.add(name)
        self._known |= texts

    @contextmanager
    def making(self) -> Iterator[Mapping[str, Any]]:
        """While other processes wait: what there is now. What is added in the block is not made twice."""
        with locked(self._folder, wait=True):
            yield self.read()


def forget(what: str, names: Collection[str]) -> int:
    """Take these names out of the texts of `what`, whatever their key; how many texts went."""
    count = 0
    for folder in sorted(_shelf().glob(f"{what}-*")):
        with locked(folder, wait=True):
            for path in sorted(folder.glob("[0-9a-f]*.json")):
                texts = _checked(path)
                left = {name: text for name, text in texts.items() if name not in names}
                if left.keys() != texts.keys():
                    if left:
                        write_json(folder / f"{content_key(left)}.json", left)
                    path.unlink()
                    sync_folder(folder)
                    count += len(texts) - len(left)
    return count


def _shelf() -> Path:
    return cache_folder() / "prompts"


def _checked(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not what its name says."""
    try:
        value = read_json(path)
    except (IntegrityError, OSError):
        return {}
    return value if isinstance(value, dict) and content_key(value) == path.stem else {}
