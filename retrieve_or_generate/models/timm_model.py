"""Image classifiers of timm: an image tower without a text tower, with or without a head of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models.base import ImageModel, plain_attention
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.store import durable_file
from retrieve_or_generate.weights import TIMM_CONFIG, TIMM_WEIGHTS

_SCALE = 1 / 0.07  # where the logit scale of CLIP starts (2103.00020, section 2.5)


class TimmModel(ImageModel):
    """A timm model: `network` gives its features, `head` its own logits of `n_classes` classes (none: 0).

    A head for other classes starts at random, since no text says what they are. The columns follow from the class names alone, so
    that sources are compared from one start.
    """

    def __init__(self, name: str, network: Any, fingerprint: str):
        data = resolve_model_data_config(network)
        channels, height, width = data["input_size"]
        if channels != 3 or height != width:
            raise UsageError(f"model {name!r}: takes {data['input_size']} pixels, but images are squares of 3 channels")
        super().__init__(name, fingerprint, height, data["mean"], data["std"], _SCALE)
        self.n_classes = int(network.num_classes)
        self.head = network.get_classifier() if self.n_classes else nn.Identity()
        pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        self.network = _without_head(name, network, self.head, self.normalise(pixels))
        with torch.inference_mode():
            self.embed_dim = self.encode_image(torch.zeros(1, 3, height, width)).shape[1]

    @property
    def tower(self) -> nn.Module:
        return self.network

    def logits(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to (b, n_classes) float32 of its own head. Raises `UsageError` without one."""
        if not self.n_classes:
            raise UsageError(f"model {self.name!r}: has no classes of its own; fine-tune it on a task")
        with plain_attention(self.device):
            return self.head(self.network(self.normalise(pixels))).float()

    def class_weights(
        self, class_names: Sequence[str], templates: Sequence[str] | Sequence[Callable[[str], str]]
    ) -> Tensor:
        """(d, classes) float32, unit columns, drawn from each class name."""
        columns = []
        for class_name in class_names:
            draw = torch.Generator().manual_seed(seed_for("models", "head", class_name))
            columns.append(F.normalize(torch.randn(self.embed_dim, generator=draw), dim=0))
        return torch.stack(columns, dim=1).to(self.device)

    def save(self, folder: Path, tower: dict[str, Tensor], text: dict[str, Tensor] | None = None) -> list[Path]:
        """As `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it, without a head."""
        folder.mkdir(parents=True, exist_ok=True)
        with durable_file(folder / TIMM_CONFIG) as path:
            save_config_for_hf(self.network, str(path))
        with durable_file(folder / TIMM_WEIGHTS) as path:
            save_file({name: value.detach().cpu().clone().contiguous() for name, value in tower.items()}, path)
        return [folder / TIMM_CONFIG, folder / TIMM_WEIGHTS]


@torch.inference_mode()
def _without_head(name: str, network: Any, head: nn.Module, pixels: Tensor) -> nn.Module:
    """`network` that gives what its head was given; `UsageError` where that is not all that lay between features and logits."""
    whole = network(pixels)
    if int(network.num_classes):
        network.reset_classifier(0)
    features = network(pixels)
    ends_alike = isinstance(features, Tensor) and features.ndim == 2 and isinstance(head, nn.Linear | nn.Identity)
    if not (ends_alike and torch.allclose(head(features), whole, atol=1e-3 * math.sqrt(1 + whole.abs().max().item()))):
        raise UsageError(f"model {name!r}: its classes are not one linear layer over its features; take another")
    return network
