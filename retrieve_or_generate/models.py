"""CLIP models through open_clip: a model takes pixels in [0, 1] and owns its normalisation.

`pocket` is the model that ships with this package; a folder is read as open_clip's `local-dir:`; `hf-hub:…` and `ARCH/tag` go to
open_clip as they are. Weights are safetensors where there is a choice, and never unpickled from a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.hub import is_unreachable, quiet
from retrieve_or_generate.weights import CLIP_CONFIG, check_pocket_weights, clip_fingerprint, clip_folder


class Clip(torch.nn.Module):
    """An open_clip model in evaluation mode with its own normalisation, preprocessing size and tokenizer.

    `fingerprint` names the weights (`weights.clip_fingerprint`).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, network: open_clip.CLIP, tokenizer: object, fingerprint: str):
        super().__init__()
        self.name, self.network, self.tokenizer, self.fingerprint = name, network, tokenizer, fingerprint
        config = open_clip.get_model_preprocess_cfg(network)
        size = config["size"]
        self.image_size = int(size[0] if isinstance(size, tuple | list) else size)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        with torch.inference_mode():
            self.embed_dim = self.encode_text(["a"]).shape[1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to what the image tower takes."""
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (scaled - self.mean) / self.std

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to (b, d) float32, unit length."""
        with plain_attention(self.device):
            return F.normalize(self.network.encode_image(self.normalise(pixels)).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float32, unit length."""
        tokens = self.tokenizer(list(texts)).to(self.device)  # type: ignore[operator]
        with plain_attention(self.device):
            return F.normalize(self.network.encode_text(tokens).float(), dim=-1)

    @torch.inference_mode()
    def class_weights(
        self, class_names: Sequence[str], templates: Sequence[str] | Sequence[Callable[[str], str]]
    ) -> torch.Tensor:
        """(d, classes) float32, unit columns: open_clip's own zero-shot classifier over `templates` of the name (at "{}")."""
        with plain_attention(self.device):
            weights = open_clip.build_zero_shot_classifier(
                self.network, self.tokenizer, list(class_names), list(templates), device=self.device
            )
        return weights.float().clone()


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as two products: the fused kernel takes longer for the few positions of small models."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def load_clip(name: str = "pocket", device: str = "cpu") -> Clip:
    """`pocket`, a folder that open_clip can load, `hf-hub:ORG/REPO`, or `ARCH/tag` of open_clip.

    Raises:
        UsageError: no such model. IntegrityError: weights that are not those recorded, or not readable.
    """
    if name == "pocket":
        check_pocket_weights("clip")
    folder = clip_folder(name)
    if folder is not None:
        return _load(name, f"local-dir:{folder}", None).to(device)
    if name.startswith("hf-hub:"):
        return _load(name, name, None).to(device)
    architecture, found, tag = name.partition("/")
    if not found or architecture not in open_clip.list_models():
        raise UsageError(
            f"unknown model {name!r}: give 'pocket', a folder with {CLIP_CONFIG}, 'hf-hub:ORG/REPO', or ARCH/tag such as "
            "ViT-B-16/laion2b_s34b_b88k (all of them: python -c 'import open_clip; print(open_clip.list_pretrained())')"
        )
    return _load(name, architecture, tag).to(device)


def _load(name: str, source: str, tag: str | None) -> Clip:
    try:
        with quiet():
            model, _, _ = open_clip.create_model_and_transforms(
                source, pretrained=tag, require_pretrained=tag is not None
            )
            tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:
        if is_unreachable(error):
            raise UsageError(
                f"model {name!r}: its hub does not answer, and it is not in the hub's cache; give a folder, or try again with "
                "a network"
            ) from error
        raise IntegrityError(f"model {name!r}: open_clip cannot load it ({str(error).splitlines()[0]})") from error
    return Clip(name, model.eval(), tokenizer, clip_fingerprint(name))


@torch.inference_mode()
def image_features(clip: Clip, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """(n, 3, s, s) uint8 to (n, d) float32, unit length, in row order."""
    parts = torch.from_numpy(images).split(batch_size)
    features = [clip.encode_image(part.to(clip.device)).cpu() for part in parts if len(part)]
    return torch.cat(features).numpy() if features else np.zeros((0, clip.embed_dim), np.float32)


@torch.inference_mode()
def text_features(clip: Clip, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
    """(n, d) float32, unit length, in the order of `texts`."""
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    features = [clip.encode_text(part).cpu() for part in parts]
    return torch.cat(features).numpy() if features else np.zeros((0, clip.embed_dim), np.float32)
