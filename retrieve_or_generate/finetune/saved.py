"""A fine-tuned model as a folder: what its library reads again by itself, and beside it the head of the task's classes.

Of CLIP: `open_clip_config.json`, `open_clip_model.safetensors` (the tower replaced, the text tower kept) and the tokenizer's files,
which plain open_clip loads as `local-dir:FOLDER`; of a timm model `config.json` and `model.safetensors`. Of the head
`head.safetensors`: `weight` (k, d) and `bias` (k,), for logits = unit features · weightᵀ + bias; and `head.json`: the class names
in the order of k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.models import ImageModel, load_model
from retrieve_or_generate.store import durable_file, read_json, write_json

HEAD, CLASSES = "head.safetensors", "head.json"


@dataclass(frozen=True)
class Saved:
    """A classifier that was read back, and what its logits are of."""

    classifier: Classifier
    class_names: tuple[str, ...]


def save_model(
    folder: Path, model: ImageModel, state: Mapping[str, Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> list[Path]:
    """Write `model` with the `state` of a `Classifier` that was trained from it; the files that were written."""
    assert all(name.startswith(("tower.", "text.", "head.")) for name in state), "what else was trained would be lost"
    folder.mkdir(parents=True, exist_ok=True)
    files = model.save(folder, _below("tower.", state), _below("text.", state))
    with durable_file(folder / HEAD) as path:
        save_file({name: value.cpu().clone().contiguous() for name, value in _below("head.", state).items()}, path)
    write_json(folder / CLASSES, {"class_names": list(class_names), "templates": list(templates)})
    return sorted({*files, folder / HEAD, folder / CLASSES})


def load_saved(folder: Path, device: str = "cpu") -> Saved:
    """The classifier that `save_model` wrote to `folder`.

    Raises:
        UsageError: no such folder, or a model without a head. IntegrityError: files that do not fit together.
    """
    if not (folder / HEAD).is_file():
        raise UsageError(f"{folder}: no {HEAD}; rog finetune --save-model writes model and head to TRIAL/model")
    names, head = read_json(folder / CLASSES)["class_names"], load_file(folder / HEAD, device=device)
    model = load_model(str(folder), device)
    if head["weight"].shape != (len(names), model.embed_dim):
        shape = tuple(head["weight"].shape)
        raise IntegrityError(f"{folder}: {HEAD} is {shape}, for {len(names)} classes and features of {model.embed_dim}")
    classifier = Classifier(model, torch.zeros(model.embed_dim, len(names), device=device))
    classifier.head.load_state_dict(head)
    return Saved(classifier, tuple(names))


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.detach() for name, value in state.items() if name.startswith(prefix)}
