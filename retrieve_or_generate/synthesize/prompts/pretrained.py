"""Captioners and language models of transformers, from the package, a folder, or a hub at a commit; safetensors only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from retrieve_or_generate.errors import FULL, IntegrityError, UsageError
from retrieve_or_generate.hub import quiet
from retrieve_or_generate.store import content_key, read_json, sha256_of
from retrieve_or_generate.weights import (
    PICKLED,
    PLAIN_WEIGHTS,
    POCKET_WEIGHTS,
    check_pocket_weights,
    first_line,
    hub_commit,
    hub_problem,
    is_hub_id,
)

_CONFIG = "config.json"
_DESCRIBES = (".json", ".txt", ".model", ".jinja")
_WANTED = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors")
_SETTING = "synthesize.prompts.model"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files come from, and in which version: two of the same `name` say the same."""

    asked: str
    part: str
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

    def load(
        self, model_class: Any, dtype: str, device: str, types: tuple[str, ...] = ()
    ) -> tuple[torch.nn.Module, Path]:
        """The model in evaluation mode on `device`, and the folder that it is in. `types`: the only values of `model_type` allowed.

        Raises:
            UsageError: no such model, one of another kind, pickled weights, too little memory.
            IntegrityError: files that are damaged or not those recorded, or lack weights.
        """
        if dtype == "float16" and device == "cpu":
            raise UsageError("synthesize.prompts.dtype: float16 is no type for a CPU; take bfloat16 or float32")
        if self.asked == "pocket":
            check_pocket_weights(self.part)
        folder = self.folder or self._download()
        config = read_json(folder / _CONFIG)
        kind = str(config.get("model_type", "")) if isinstance(config, dict) else ""
        if types and kind not in types:
            raise UsageError(f"{self.asked}: a model of type {kind!r}; {_SETTING} takes {' or '.join(types)} here")
        _check_weights(folder, self.asked)
        with quietly():
            try:
                model, told = model_class.from_pretrained(
                    folder,
                    use_safetensors=True,
                    dtype=getattr(torch, dtype),
                    local_files_only=True,
                    output_loading_info=True,
                )
                model = model.eval().to(device)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise UsageError(
                    f"{self.asked}: more than the memory of {device} holds; try synthesize.prompts.dtype=bfloat16, or a smaller "
                    "model"
                ) from error
            except ValueError as error:
                raise UsageError(f"{self.asked}: no model for this ({first_line(error)[:200]})") from error
            except Exception as error:
                raise IntegrityError(f"{folder}: transformers cannot load it ({first_line(error)[:200]})") from error
        if told["missing_keys"]:
            raise IntegrityError(f"{folder}: lacks weights of the model, such as {min(told['missing_keys'])}")
        return model, folder

    def _download(self) -> Path:
        """The snapshot of the commit in the hub's cache on this machine, completed where something is missing."""
        try:
            with quietly():
                folder = Path(
                    snapshot_download(
                        self.repository, revision=self.revision, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]
                    )
                )
        except OSError as error:
            if error.errno in FULL:
                raise
            raise hub_problem(self.name, error) from error
        except Exception as error:
            raise hub_problem(self.name, error) from error
        if not (folder / _CONFIG).is_file():
            raise UsageError(f"{self.name}: no {_CONFIG}, so it is no model of transformers")
        return folder


def find_model(name: str, part: str) -> ModelFiles:
    """The model called `name`: `pocket` (then `part` of the package's weights), a folder, `ORG/NAME` or `ORG/NAME@REVISION`.

    Loads nothing. Raises `UsageError` where there is no such thing.
    """
    folder = POCKET_WEIGHTS / part if name == "pocket" else Path(name)
    if folder.is_dir():
        _check_weights(folder, name)
        return ModelFiles(name, part, folder, name if name == "pocket" else folder.resolve().name, _content(folder))
    if not is_hub_id(name):
        raise UsageError(
            f"unknown model {name!r}: give {_SETTING} as 'pocket', a folder that transformers' save_pretrained wrote, or a Hub id "
            "(ORG/NAME, ORG/NAME@COMMIT)"
        )
    return ModelFiles(name, part, None, *hub_commit(name))


def _check_weights(folder: Path, name: str) -> None:
    """Raise `UsageError` unless there are a configuration and weights that run no code."""
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"{folder}: no {_CONFIG}; a model is a folder that transformers' save_pretrained wrote")
    if not any(PLAIN_WEIGHTS.fullmatch(path.name) for path in folder.glob("*.safetensors")):
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED), None)
        what = f"its weights are pickled ({pickled}), which are never read" if pickled else "no weights in it"
        raise UsageError(f"{name if name != 'pocket' else folder}: {what}; safetensors are wanted")


def _content(folder: Path) -> str:
    """16 hex digits of the names and bytes of what transformers reads."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.suffix in _DESCRIBES or PLAIN_WEIGHTS.fullmatch(path.name))
    ]
    return content_key([[path.name, sha256_of(path)] for path in files])


@contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers logs, and its bars; those of downloads stay on a terminal."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    downloads = not sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads:
        disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if downloads:
            enable_progress_bars()
