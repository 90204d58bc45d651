"""Where weights lie, whether they are what was recorded, and what names them in a content key. Loads no model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.store import check_files, content_key, read_json, sha256_of

POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TIMM_CONFIG, TIMM_WEIGHTS = "config.json", "model.safetensors"
PIPELINE_INDEX = "model_index.json"
PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
"""Endings of files that can run code when they are loaded."""
PLAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")
"""Names of the weights that diffusers and transformers read unless a variant (such as `fp16`) is asked for."""
WEIGHT_FILES = PICKLED | {".safetensors", ".npz"}
_DESCRIBES = frozenset({".json", ".txt", ".model"})  # configurations and vocabularies
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelFiles:
    """Where an image model comes from: what `library` is asked for, as the library calls it."""

    name: str
    library: Literal["open_clip", "timm"]
    source: str
    """An architecture, `local-dir:FOLDER`, or `hf-hub:ORG/REPO`."""
    tag: str | None = None
    """Published weights of the architecture."""
    file: Path | None = None
    """Weights that lie here, in a folder or by themselves."""

    @property
    def folder(self) -> Path | None:
        return Path(self.source.removeprefix("local-dir:")) if self.source.startswith("local-dir:") else None

    @property
    def fingerprint(self) -> str:
        """16 hex digits: of the weights that lie here and what says how they are used (a folder's configuration and vocabulary, a
        file's architecture), else of the name, which a library ties to one published file.
        """
        if self.file is None:
            return content_key([self.library, self.name])
        sha256 = _sha256_once(self.file, *_state(self.file))
        if self.folder is None:
            return content_key([self.library, self.source, sha256])
        if self.folder == POCKET_WEIGHTS / "clip":  # whose configuration never changes beside the weights
            return sha256[:16]
        beside = sorted(path for path in self.folder.iterdir() if path.suffix in _DESCRIBES)
        return content_key([sha256, *([path.name, _sha256_once(path, *_state(path))] for path in beside)])


def find_model(name: str) -> ModelFiles:
    """The image model called `name`, by its form alone (no library is asked whether it knows it):

    `pocket`; a folder of open_clip or timm; `hf-hub:ORG/REPO`; `ARCH/TAG` or `ARCH/FILE` of open_clip; `timm:ARCH`,
    `timm:ARCH/TAG`, `timm:ARCH/FILE` or `timm:FOLDER`. A FILE may end in `#SHA256`, which it then must have.

    Raises:
        UsageError: a name of no such form, no such file, a folder without a model. IntegrityError: a file of another sha256.
    """
    if name == "pocket":
        return _in_folder(name, POCKET_WEIGHTS / "clip")
    library, given = _library_of(name)
    if given and Path(given).is_dir():
        return _in_folder(name, Path(given))
    if given.startswith("hf-hub:"):
        return ModelFiles(name, library, given)
    architecture, found, rest = given.partition("/")
    if Path(given.partition("#")[0]).is_file():
        raise UsageError(f"model {name!r}: a file does not say what architecture it is of; write ARCH/{given}")
    if found and _names_a_file(rest):
        return ModelFiles(name, library, architecture, file=_checked_file(name, rest))
    if library == "timm" and architecture:
        return ModelFiles(name, library, architecture, tag=rest or None)
    if not found or not architecture or not rest:
        raise unknown_model(name)
    return ModelFiles(name, library, architecture, tag=rest)


def unknown_model(name: str) -> UsageError:
    """What to tell of a name that stands for no model."""
    return UsageError(
        f"unknown model {name!r}: give 'pocket', a folder with {CLIP_CONFIG}, 'hf-hub:ORG/REPO', ARCH/TAG such as "
        "ViT-B-16/laion2b_s34b_b88k (rog models lists them), ARCH/FILE#SHA256, or 'timm:ARCH/TAG'"
    )


def _library_of(name: str) -> tuple[Literal["open_clip", "timm"], str]:
    return ("timm", name.removeprefix("timm:")) if name.startswith("timm:") else ("open_clip", name)


def _in_folder(name: str, folder: Path) -> ModelFiles:
    """The model of a folder: open_clip's where its configuration lies there, else timm's."""
    kinds: tuple[tuple[Literal["open_clip", "timm"], str, str], ...] = (
        ("open_clip", CLIP_CONFIG, CLIP_WEIGHTS),
        ("timm", TIMM_CONFIG, TIMM_WEIGHTS),
    )
    for library, config, weights in kinds:
        if (folder / config).is_file() and (library == "open_clip" or "architecture" in read_json(folder / config)):
            if not (folder / weights).is_file():
                raise UsageError(f"{folder}: no {weights}; a model folder has its weights as safetensors")
            return ModelFiles(name, library, f"local-dir:{folder}", file=folder / weights)
    raise UsageError(f"{folder}: no {CLIP_CONFIG}; a model folder is what open_clip's push_to_hf_hub writes")


def _names_a_file(text: str) -> bool:
    path = Path(text.partition("#")[0])
    return "#" in text or path.suffix in WEIGHT_FILES or path.is_file()


def _checked_file(name: str, text: str) -> Path:
    """The file that `FILE` or `FILE#SHA256` names."""
    path, _, sha256 = text.partition("#")
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"model {name!r}: no file {path}")
    if "#" in text and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"model {name!r}: what follows # is no sha256 (64 hexadecimal digits)")
    if sha256 and (is_now := _sha256_once(file, *_state(file))) != sha256.lower():
        raise IntegrityError(f"{file}: its sha256 is {is_now}, not {sha256.lower()}")
    return file


@dataclass(frozen=True)
class GeneratorFiles:
    """Where a generator's files come from, and in which version: two of the same `name` make the same images."""

    folder: Path | None
    """None: `repository` is a Hub id, and `revision` a commit."""
    repository: str
    revision: str

    @property
    def name(self) -> str:
        """As it is recorded with each image: `pocket@…`, `FOLDER@…` (the digits of its content), `ORG/NAME@COMMIT`."""
        return f"{self.repository}@{self.revision}"

    @property
    def fingerprint(self) -> str:
        """16 hex digits: of every file in a folder that a pipeline is made of, else of the Hub id and the commit."""
        return self.revision if self.folder else content_key(["diffusers", self.repository, self.revision])


def find_generator(name: str) -> GeneratorFiles:
    """The generator called `name`: `pocket`, a folder, or a Hub id as `ORG/NAME` or `ORG/NAME@REVISION`. Loads nothing.

    A Hub id without a commit is looked up (`hub_commit`). Raises `UsageError` where there is no such thing.
    """
    folder = POCKET_WEIGHTS / "stable-diffusion" if name == "pocket" else Path(name)
    if folder.is_dir():
        return GeneratorFiles(folder, name if name == "pocket" else folder.resolve().name, _pipeline_content(folder))
    if folder.is_file():
        raise UsageError(
            f"{name}: one file; a generator is a folder that diffusers' save_pretrained wrote, or a Hub id (a single .safetensors "
            "file becomes one by diffusers' from_single_file and save_pretrained)"
        )
    if not is_hub_id(name):
        what = f"no folder {name!r}" if "/" in name else f"unknown generator {name!r}"
        raise UsageError(
            f"{what}: give 'pocket', a folder, or a Hub id of a diffusers pipeline (ORG/NAME, ORG/NAME@COMMIT)"
        )
    return GeneratorFiles(None, *hub_commit(name))


def generator_fingerprint(name: str) -> str:
    """`GeneratorFiles.fingerprint` of the generator called `name`."""
    return find_generator(name).fingerprint


def pinned_generator(name: str) -> str:
    """A name that stands for the same files from now on: a Hub id gets its commit, others are as they were."""
    files = find_generator(name)
    return name if files.folder else files.name


def _pipeline_content(folder: Path) -> str:
    """16 hex digits of the paths and bytes of what diffusers reads; `UsageError` if the folder holds no pipeline."""
    if not (folder / PIPELINE_INDEX).is_file():
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED), None)
        what = f"pickled weights ({pickled}), which are never read, and no" if pickled else "no"
        raise UsageError(
            f"{folder}: {what} {PIPELINE_INDEX}; a generator is a folder that diffusers' save_pretrained wrote, with weights as "
            "safetensors"
        )
    parts = [
        path for path in sorted(folder.glob("*/*")) if path.suffix in _DESCRIBES or PLAIN_WEIGHTS.fullmatch(path.name)
    ]
    files = [folder / PIPELINE_INDEX, *parts]
    return content_key([[path.relative_to(folder).as_posix(), _sha256_once(path, *_state(path))] for path in files])


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=1024)
def _sha256_once(path: Path, *_: int) -> str:
    """Read gigabytes once in a process, as long as the file is the one that was read."""
    return sha256_of(path)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, with or without a revision."""
    return _HUB_ID.fullmatch(name) is not None


def hub_commit(name: str) -> tuple[str, str]:
    """The Hub id and the commit that `ORG/NAME`, `ORG/NAME@BRANCH`, `@TAG` or `@COMMIT` stands for today.

    A commit is taken as it is. All else is asked of the hub, or of its cache on this machine where the hub does not answer.
    Raises `UsageError` in one line: no such model or revision, no access, no answer.
    """
    from huggingface_hub import resolve_revision

    repository, _, revision = name.partition("@")
    try:
        return repository, resolve_revision(repository, revision=revision or None).resolved
    except Exception as error:
        raise hub_problem(name, error) from error


def hub_problem(name: str, error: BaseException) -> UsageError:
    """What to tell of an `error` that came of asking a hub for the model `name`."""
    from huggingface_hub import constants, errors

    hub, (repository, _, revision) = constants.ENDPOINT, name.partition("@")
    causes = [error]
    while (below := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(below)

    def came_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if came_of(errors.GatedRepoError):
        return UsageError(f"{name}: its owner asks for consent; give it at {hub}/{repository}, and a token as HF_TOKEN")
    if came_of(errors.RevisionNotFoundError):
        return UsageError(f"{repository}: no revision {revision!r} at {hub}; give a branch, a tag, or a commit in full")
    if came_of(errors.RepositoryNotFoundError):
        return UsageError(
            f"{name}: no such folder, and no such model at {hub} (a private one needs a token as HF_TOKEN)"
        )
    if came_of(errors.OfflineModeIsEnabled):
        return UsageError(f"{name}: not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask {hub} for it")
    if came_of(errors.HTTPError) and not came_of(errors.HfHubHTTPError):
        return UsageError(f"{name}: no such folder, not in {constants.HF_HUB_CACHE}, and {hub} does not answer")
    return UsageError(f"{name}: {hub} does not give it ({first_line(error)})")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_pocket_weights(part: str) -> None:
    """Compare the package's own weights under `part` with their recorded checksums; `IntegrityError` names what changed."""
    files = read_json(POCKET_WEIGHTS / "checksums.json")
    check_files(POCKET_WEIGHTS, {path: record for path, record in files.items() if path.startswith(part + "/")})


def clip_fingerprint(name: str) -> str:
    """`ModelFiles.fingerprint` of the model called `name`."""
    return find_model(name).fingerprint
