"""Where weights lie, whether they are what was recorded, and what names them in a content key. Loads no model."""

from __future__ import annotations

from pathlib import Path

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.store import check_files, content_key, read_json, sha256_of

POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def clip_folder(name: str) -> Path | None:
    """The folder of the model called `name`; None if open_clip is to find it. `UsageError` if the folder holds no model."""
    folder = POCKET_WEIGHTS / "clip" if name == "pocket" else Path(name)
    if not folder.is_dir():
        return None
    for needed in (CLIP_CONFIG, CLIP_WEIGHTS):
        if not (folder / needed).is_file():
            raise UsageError(f"{folder}: no {needed}; a model folder is what open_clip's push_to_hf_hub writes")
    return folder


def generator_folder(name: str) -> Path | None:
    """The folder of the pipeline called `name`; None if it is a Hub id. `UsageError` if the folder holds no pipeline."""
    folder = POCKET_WEIGHTS / "stable-diffusion" if name == "pocket" else Path(name)
    if not folder.is_dir():
        return None
    if not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{folder}: no model_index.json; a generator is a folder that diffusers' save_pretrained wrote"
        )
    return folder


def check_pocket_weights(part: str) -> None:
    """Compare the package's own weights under `part` with their recorded checksums; `IntegrityError` names what changed."""
    files = read_json(POCKET_WEIGHTS / "checksums.json")
    check_files(POCKET_WEIGHTS, {path: record for path, record in files.items() if path.startswith(part + "/")})


def clip_fingerprint(name: str) -> str:
    """16 hex digits: of the weights file in a folder, else of the name, which open_clip ties to one published file."""
    folder = clip_folder(name)
    return sha256_of(folder / CLIP_WEIGHTS)[:16] if folder else content_key(["open_clip", name])


def generator_fingerprint(name: str) -> str:
    """16 hex digits: of every weights and configuration file in a folder, else of the Hub id."""
    folder = generator_folder(name)
    if folder is None:
        return content_key(["diffusers", name])
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json")]
    return content_key([[path.relative_to(folder).as_posix(), sha256_of(path)] for path in files])
