"""Captioners and language models loaded through transformers, as safetensors only; whatever is wrong with one ends in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from retrieve_or_generate.errors import FULL, IntegrityError, UsageError
from retrieve_or_generate.hub import quiet
from retrieve_or_generate.store import read_json
from retrieve_or_generate.text_models import CONFIG, SETTING, TextModelFiles, check_text_model
from retrieve_or_generate.weights import check_pocket_weights, first_line, hub_problem

_WANTED = ("*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*-of-*.safetensors")


def load_text_model(
    files: TextModelFiles, model_class: Any, dtype: str, device: str, types: Sequence[str] = ()
) -> tuple[torch.nn.Module, Path]:
    """The model in evaluation mode on `device`, and the folder that it is in. `types`: the only values of `model_type` allowed.

    Raises:
        UsageError: a model of another kind, pickled weights, no answer of the hub, too little memory.
        IntegrityError: files that are damaged or not those recorded, or lack weights.
    """
    if dtype == "float16" and device == "cpu":
        raise UsageError("synthesize.prompts.dtype: float16 is no type for a CPU; take bfloat16 or float32")
    if files.asked == "pocket":
        check_pocket_weights(files.part)
    folder = files.folder or _download(files)
    _check_kind(folder, files.asked, types)
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
                f"{files.asked}: more than the memory of {device} holds; try synthesize.prompts.dtype=bfloat16, or a smaller model"
            ) from error
        except ValueError as error:
            raise UsageError(f"{files.asked}: no model for this ({first_line(error)[:200]})") from error
        except Exception as error:
            raise IntegrityError(f"{folder}: transformers cannot load it ({first_line(error)[:200]})") from error
    if told["missing_keys"]:
        raise IntegrityError(f"{folder}: lacks weights of the model, such as {min(told['missing_keys'])}")
    return model, folder


def _check_kind(folder: Path, name: str, types: Sequence[str]) -> None:
    config = read_json(folder / CONFIG)
    kind = str(config.get("model_type", "")) if isinstance(config, dict) else ""
    if types and kind not in types:
        raise UsageError(f"{name}: a model of type {kind!r}; {SETTING} takes {' or '.join(types)} here")


def _download(files: TextModelFiles) -> Path:
    """The snapshot of the commit in the hub's cache on this machine, completed where something is missing."""
    try:
        with quietly():
            folder = Path(
                snapshot_download(
                    files.repository, revision=files.revision, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]
                )
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise hub_problem(files.name, error) from error
    try:
        check_text_model(folder)
    except UsageError as error:
        raise UsageError(f"{files.name}: {str(error).removeprefix(f'{folder}: ')}") from error
    return folder


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
