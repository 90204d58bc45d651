"""What every image model has: a tower, its own normalisation and size, unit features, and columns to start a head from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class ImageModel(nn.Module, ABC):
    """A model in evaluation mode. `fingerprint` names its weights (`weights.clip_fingerprint`); `embed_dim` is that of features."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, fingerprint: str, image_size: int, mean: Sequence[float], std: Sequence[float], scale: float
    ):
        super().__init__()
        self.name, self.fingerprint, self.image_size = name, fingerprint, image_size
        self.logit_scale = scale
        """What logits of unit features and unit class weights are multiplied with."""
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    embed_dim: int

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """Normalised pixels to (b, d) features of any length, or to a tuple that begins with them."""

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to what the image tower takes."""
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (scaled - self.mean) / self.std

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to (b, d) float32, unit length."""
        with plain_attention(self.device):
            output = self.tower(self.normalise(pixels))
        return F.normalize((output[0] if isinstance(output, tuple) else output).float(), dim=-1)

    @abstractmethod
    def class_weights(
        self, class_names: Sequence[str], templates: Sequence[str] | Sequence[Callable[[str], str]]
    ) -> Tensor:
        """(d, classes) float32, unit columns: where a head of these classes starts."""

    @abstractmethod
    def save(self, folder: Path, tower: dict[str, Tensor], text: dict[str, Tensor] | None = None) -> list[Path]:
        """Write this model with another state of its tower to `folder`, as its library reads one; the files.

        `text` is the state of all else of a CLIP model, where that was trained too.
        """


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as two products: the fused kernel takes longer for the few positions of small models."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@torch.inference_mode()
def image_features(model: ImageModel, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """(n, 3, s, s) uint8 to (n, d) float32, unit length, in row order."""
    parts = torch.from_numpy(images).split(batch_size)
    features = [model.encode_image(part.to(model.device)).cpu() for part in parts if len(part)]
    return torch.cat(features).numpy() if features else np.zeros((0, model.embed_dim), np.float32)
