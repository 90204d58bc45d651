"""A CLIP of the pocket's shape with random weights, and images of a few colours that it can learn in some updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg

from retrieve_or_generate.finetune import LabelledImages
from retrieve_or_generate.models import Clip

VISION = {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 713, "width": 128, "heads": 4, "layers": 3}


def letters(texts: Sequence[str]) -> torch.Tensor:
    """A tokenizer: one token a character, the largest id at the end, as open_clip's towers expect."""
    tokens = torch.zeros(len(texts), TEXT["context_length"], dtype=torch.long)
    for row, text in enumerate(texts):
        ids = [ord(character) % 700 for character in text[:15]] + [712]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def make_clip(dim: int = 128, vision: dict[str, object] | None = None) -> Clip:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.CLIP(dim, vision or VISION, TEXT).eval()
    set_model_preprocess_cfg(network, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.28,) * 3})
    return Clip("random", network, letters, "0" * 16)


def coloured(n: int, seed: int, classes: int = 3) -> LabelledImages:
    """Noise around one colour a class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])[labels]
    images = (colours[:, :, None, None] + rng.normal(0, 40, (n, 3, 32, 32))).clip(0, 255).astype(np.uint8)
    return LabelledImages(images, labels, tuple(f"{seed}-{row}" for row in range(n)))
