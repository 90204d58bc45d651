"""Where captioners and language models lie, and in which version: in the package, a folder, or a model hub. Loads none of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.store import content_key, sha256_of
from retrieve_or_generate.weights import PICKLED, PLAIN_WEIGHTS, POCKET_WEIGHTS, hub_commit, is_hub_id

Part = Literal["captioner", "language"]
"""Which of the package's own models `pocket` stands for."""

SETTING = "synthesize.prompts.model"
CONFIG = "config.json"
_DESCRIBES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class TextModelFiles:
    """Where a model's files come from, and in which version: two of the same `name` say the same."""

    asked: str
    part: Part
    folder: Path | None
    """None: `repository` is a Hub id, and `revision` a commit."""
    repository: str
    revision: str

    @property
    def name(self) -> str:
        """As it is recorded: `pocket@…`, `FOLDER@…` (the digits of its content), `ORG/NAME@COMMIT`."""
        return f"{self.repository}@{self.revision}"

    @property
    def fingerprint(self) -> str:
        """16 hex digits: of the files of a folder, else of the Hub id and the commit."""
        return self.revision if self.folder else content_key(["transformers", self.repository, self.revision])


def find_text_model(name: str, part: Part) -> TextModelFiles:
    """The model called `name`: `pocket` (then `part` of the package's weights), a folder, `ORG/NAME` or `ORG/NAME@REVISION`.

    Raises `UsageError` where there is no such thing, or its weights are pickled.
    """
    folder = POCKET_WEIGHTS / part if name == "pocket" else Path(name)
    if folder.is_dir():
        check_text_model(folder)
        called = name if name == "pocket" else folder.resolve().name
        return TextModelFiles(name, part, folder, called, _content(tuple(_read_by_transformers(folder))))
    if not is_hub_id(name):
        raise UsageError(
            f"unknown model {name!r}: give {SETTING} as 'pocket', a folder that transformers' save_pretrained wrote, or a Hub id "
            "(ORG/NAME, ORG/NAME@COMMIT)"
        )
    return TextModelFiles(name, part, None, *hub_commit(name))


def check_text_model(folder: Path) -> None:
    """Raise `UsageError` unless there are a configuration and weights that run no code."""
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: no {CONFIG}; a model is a folder that transformers' save_pretrained wrote")
    if not any(PLAIN_WEIGHTS.fullmatch(path.name) for path in folder.glob("*.safetensors")):
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED), None)
        what = f"its weights are pickled ({pickled}), which are never read" if pickled else "no weights in it"
        raise UsageError(f"{folder}: {what}; safetensors are wanted")


def _read_by_transformers(folder: Path) -> list[tuple[Path, int, int]]:
    """What counts of a folder, in order, each file with its size and date."""
    paths = (path for path in sorted(folder.iterdir()) if path.is_file())
    read = [path for path in paths if path.suffix in _DESCRIBES or PLAIN_WEIGHTS.fullmatch(path.name)]
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in read]


@lru_cache(maxsize=64)
def _content(files: tuple[tuple[Path, int, int], ...]) -> str:
    """16 hex digits of names and bytes. Gigabytes are read once in a process, as long as the files are those that were read."""
    return content_key([[path.name, sha256_of(path)] for path, _, _ in files])
