"""From a model's name to the model: the libraries are asked, and what they say of trouble becomes one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import open_clip
import timm
import torch
from safetensors import safe_open

from retrieve_or_generate.errors import IntegrityError, UsageError, unknown_name
from retrieve_or_generate.hub import is_unreachable, quiet
from retrieve_or_generate.models.base import ImageModel
from retrieve_or_generate.models.clip import Clip
from retrieve_or_generate.models.timm_model import TimmModel
from retrieve_or_generate.weights import (
    ModelFiles,
    check_pocket_weights,
    find_model,
    first_line,
    unknown_model,
)

_QUICK = "-quickgelu"
T = TypeVar("T")


def load_clip(name: str = "pocket", device: str = "cpu") -> Clip:
    """The CLIP called `name` (`weights.find_model`), in evaluation mode.

    Raises:
        UsageError: no such model, or one without a text tower. IntegrityError: weights that are not those recorded, not
        readable, or of another architecture.
    """
    model = load_model(name, device)
    if not isinstance(model, Clip):
        raise UsageError(f"model {name!r}: has no text tower, so it can be fine-tuned, but neither search nor filter")
    return model


def load_model(name: str = "pocket", device: str = "cpu") -> ImageModel:
    """The image model called `name`, with or without a text tower; raises as `load_clip` does."""
    if name == "pocket":
        check_pocket_weights("clip")
    files = find_model(name)
    load = _load_timm if files.library == "timm" else _load_open_clip
    return load(files).to(device).eval()


def _load_open_clip(files: ModelFiles) -> Clip:
    if ":" not in files.source:
        check_names(files)
    pretrained = str(files.file) if files.file and not files.folder else files.tag
    own = _preprocessing(files.source) if files.file and not files.folder else {}

    def load() -> tuple[Any, Any, Any]:
        network = open_clip.create_model_and_transforms(
            files.source, pretrained=pretrained, require_pretrained=True, **own
        )[0]
        return network, open_clip.get_tokenizer(files.source), open_clip.get_model_config(files.source)

    network, tokenizer, config = _asked(files, load)
    if files.file and not files.folder:
        _check_not_stretched(files, network)
    return Clip(files.name, network.eval(), tokenizer, files.fingerprint, config)


def check_names(files: ModelFiles) -> None:
    """`UsageError` for an architecture or tag that open_clip does not have, or a tag that was trained with another activation."""
    architecture, tag = files.source, files.tag
    if architecture not in open_clip.list_models():
        raise unknown_model(files.name)
    if tag is None:
        return
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not open_clip.is_pretrained_cfg(architecture, tag):
        twin = _twin(architecture)
        if open_clip.is_pretrained_cfg(twin, tag):
            raise UsageError(
                f"model {files.name!r}: these weights are not of {architecture}, whose activation is another; give {twin}/{tag}"
            )
        raise UsageError(f"model {files.name!r}: {unknown_name(f'weights of {architecture}', tag, tags)}")
    _check_activation(files, architecture, tag)


def _twin(architecture: str) -> str:
    """The same architecture with the other of the two activations, GELU and QuickGELU, as open_clip calls it."""
    return architecture.removesuffix(_QUICK) if architecture.endswith(_QUICK) else architecture + _QUICK


def _check_activation(files: ModelFiles, architecture: str, tag: str) -> None:
    """Weights run with the other activation still give numbers, only worse ones, and open_clip does no more than warn."""
    is_quick = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    was_quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
    if is_quick != was_quick and open_clip.is_pretrained_cfg(_twin(architecture), tag):
        raise UsageError(
            f"model {files.name!r}: these weights were trained with {'QuickGELU' if was_quick else 'GELU'}, which {architecture} "
            f"does not have; give {_twin(architecture)}/{tag}"
        )


def _preprocessing(architecture: str) -> dict[str, Any]:
    """Mean and deviation that all published weights of an architecture agree on: a file of weights does not say its own."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    seen = {
        (tuple(cfg["mean"]), tuple(cfg["std"]))
        for tag in tags
        if "mean" in (cfg := open_clip.get_pretrained_cfg(architecture, tag)) and cfg["mean"]
    }
    return dict(zip(("image_mean", "image_std"), seen.pop(), strict=True)) if len(seen) == 1 else {}


def _load_timm(files: ModelFiles) -> TimmModel:
    architecture, local = files.source, files.file is not None and files.folder is None
    if ":" not in architecture:
        if not timm.is_model(architecture.partition(".")[0]):
            raise unknown_name("timm model", architecture, timm.list_models())
        if files.tag and (tags := _timm_tags(architecture)) and files.tag not in tags:
            raise UsageError(f"model {files.name!r}: {unknown_name(f'weights of {architecture}', files.tag, tags)}")
    asked = f"{architecture}.{files.tag}" if files.tag else architecture
    given: dict[str, Any] = {"checkpoint_path": str(files.file), "num_classes": _classes_in(files)} if local else {}
    network = _asked(files, lambda: timm.create_model(asked, pretrained=not local, **given))
    return TimmModel(files.name, network.eval(), files.fingerprint)


def _timm_tags(architecture: str) -> list[str]:
    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]


def _classes_in(files: ModelFiles) -> int:
    """How many classes the head in a file of timm weights has; 0 where it has none."""
    if files.file is None or files.file.suffix == ".npz":
        return 0
    place = str(files.file)
    state = _asked(files, lambda: timm.models.load_state_dict(place, weights_only=True))
    classifier = timm.models.get_pretrained_cfg(files.source).classifier
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return next((len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state), 0)


def _check_not_stretched(files: ModelFiles, network: torch.nn.Module) -> None:
    """Where only the positions differ, open_clip interpolates them: that is another architecture (or image size) all the same."""
    here = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, shape in _shapes(files).items():
        if name in here and here[name] != shape and len(shape) > 0:
            raise _of_another_architecture(files, f"{name} is {shape} there, {here[name]} here")


def _shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's weights, by name; none of what is no state dict (`.npz`, which open_clip converts)."""
    path = files.file
    assert path is not None
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if path.suffix == ".npz":
        return {}
    found = torch.load(path, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found)
    return {
        name.removeprefix("module."): tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")
    }


def _asked(files: ModelFiles, load: Callable[[], T]) -> T:
    """What a library gives, or in one line why it does not."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception as error:
        if is_unreachable(error):
            raise UsageError(
                f"model {files.name!r}: its hub does not answer, and it is not in the hub's cache; give a folder, or try again "
                "with a network"
            ) from error
        if problem := _mismatch(str(error)):
            raise _of_another_architecture(files, problem) from error
        if "TorchScript" in str(error):
            raise UsageError(
                f"{files.file}: a TorchScript archive, which is a program; give the published tag (as ViT-B-16-quickgelu/openai) "
                "or a state dict as safetensors"
            ) from error
        if "Unsupported global" in str(error):
            raise IntegrityError(
                f"{files.file}: holds more than weights, and what else may be a program; give a state dict, best as safetensors"
            ) from error
        what = files.file or f"model {files.name!r}"
        raise IntegrityError(f"{what}: {files.library} cannot load it ({first_line(error)})") from error


def _of_another_architecture(files: ModelFiles, problem: str) -> IntegrityError:
    what = "the configuration beside them says" if files.folder else files.source
    return IntegrityError(f"{files.file or files.name}: weights of another architecture than {what} ({problem})")


def _mismatch(told: str) -> str | None:
    """The first difference that torch tells of a state dict and a model, in short."""
    sizes = re.search(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", told)
    if sizes:
        return "{} is {} there, {} here".format(*sizes.groups())
    names = re.search(r"(Missing|Unexpected) key\(s\) in state_dict: \"([^\"]+)\"", told)
    if names:
        return f"{names[2]} is {'not there' if names[1] == 'Missing' else 'there, not here'}"
    return None
