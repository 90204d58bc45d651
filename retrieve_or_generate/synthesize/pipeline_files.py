"""The files of a pipeline: fetched from a hub, and looked at before anything is loaded.

Weights are safetensors. What is pickled is refused by its name, and code that a folder brings along is not run.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open

from retrieve_or_generate.errors import FULL, IntegrityError, UsageError
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.store import read_json
from retrieve_or_generate.synthesize.unsaid import unsaid
from retrieve_or_generate.weights import PICKLED, PIPELINE_INDEX, PLAIN_WEIGHTS, GeneratorFiles, first_line, hub_problem

CHECKER = "safety_checker"
_SHARDS = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
_OURS = "retrieve_or_generate.pocket."  # the pocket autoencoder


def fetch(files: GeneratorFiles, settings: SynthesizeSettings) -> Path:
    """The snapshot of a commit in the hub's cache on this machine, completed where something is missing."""
    unwanted = {} if settings.safety_checker else {CHECKER: None}
    asked = {"revision": files.revision, "use_safetensors": True, **unwanted}
    with unsaid():
        try:
            return Path(DiffusionPipeline.download(files.repository, local_files_only=True, **asked))
        except (OSError, ValueError):
            pass  # not all of it is here
        try:
            return Path(DiffusionPipeline.download(files.repository, **asked))
        except Exception as error:
            raise _not_given(files, error) from error


def _not_given(files: GeneratorFiles, error: Exception) -> Exception:
    if isinstance(error, RemoteEntryNotFoundError):
        return UsageError(f"{files.name}: no {PIPELINE_INDEX}, so it is no pipeline of diffusers")
    if "Could not find the necessary `safetensors`" in str(error):
        return UsageError(
            f"{files.name}: weights that are pickled, which are never read, or a variant alone; ask for a revision with "
            "safetensors under their plain names"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return error
    return hub_problem(files.name, error)


def read_index(folder: Path, settings: SynthesizeSettings) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that are to be loaded: library and class by name. `UsageError` if it makes no images of text."""
    index = read_json(folder / PIPELINE_INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str):
        raise UsageError(f"{folder / PIPELINE_INDEX}: no pipeline of diffusers' own (_class_name: {kind!r})")
    known = {one.__name__ for one in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() if "Control" not in one.__name__}
    if kind not in known or "vae" not in index:
        raise UsageError(
            f"{folder}: a {kind}, which makes no images of text alone in latents of a VAE; give a pipeline such as "
            "StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline or FluxPipeline"
        )
    parts = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    unwanted = () if settings.safety_checker else (CHECKER,)
    wanted = {name: value for name, value in parts.items() if None not in value and name not in unwanted}
    if CHECKER in wanted and "feature_extractor" not in wanted:
        raise UsageError(
            f"{folder}: a safety checker without its feature_extractor; add that, or set synthesize.safety_checker=false"
        )
    return wanted


def check_part(folder: Path, library: str) -> None:
    """`UsageError` if a part of a pipeline is not there, pickled or brings code; `IntegrityError` if it is damaged."""
    known = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, library)
    if not known and not library.startswith(_OURS):
        raise UsageError(f"{folder}: of library {library!r}; parts of diffusers and transformers are loaded, no others")
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: missing, though {PIPELINE_INDEX} names it")
    weights = [path for path in sorted(folder.iterdir()) if PLAIN_WEIGHTS.fullmatch(path.name)]
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
    if pickled and not weights:
        raise UsageError(
            f"{folder}: pickled weights ({pickled[0]}), which can run code and are never read; give a pipeline saved as safetensors"
        )
    for path in weights:
        _check_safetensors(path)
    for index in _SHARDS:
        if (folder / index).is_file():
            _check_shards(folder / index)


def _check_safetensors(path: Path) -> None:
    """That the header is whole and the file as long as it says."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: damaged ({first_line(error)}); get it anew") from error


def _check_shards(path: Path) -> None:
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise IntegrityError(f"{path}: no index of shards (no weight_map); get it anew")
    for shard in sorted({str(name) for name in index["weight_map"].values()}):
        if not PLAIN_WEIGHTS.fullmatch(shard):
            raise UsageError(f"{path}: names {shard!r}, which is no safetensors file beside it")
        if not (path.parent / shard).is_file():
            raise IntegrityError(f"{path.parent / shard}: missing, though {path.name} names it")
