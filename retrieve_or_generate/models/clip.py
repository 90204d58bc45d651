"""CLIP models of open_clip: an image and a text tower in one space."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from retrieve_or_generate.models.base import ImageModel, plain_attention
from retrieve_or_generate.store import durable_file, write_bytes, write_json
from retrieve_or_generate.weights import CLIP_CONFIG, CLIP_WEIGHTS


class Clip(ImageModel):
    """An open_clip model with its tokenizer. `config` is what open_clip builds its `network` from (`model_cfg`)."""

    def __init__(
        self,
        name: str,
        network: open_clip.CLIP,
        tokenizer: object,
        fingerprint: str,
        config: dict[str, Any] | None = None,
    ):
        preprocess = open_clip.get_model_preprocess_cfg(network)
        size = preprocess["size"]
        scale = network.logit_scale.detach().exp().item()
        side = int(size[0] if isinstance(size, tuple | list) else size)
        super().__init__(name, fingerprint, side, preprocess["mean"], preprocess["std"], scale)
        self.network, self.tokenizer, self.config = network, tokenizer, config
        with torch.inference_mode():
            self.embed_dim = self.encode_text(["a"]).shape[1]

    @property
    def tower(self) -> nn.Module:
        return self.network.visual

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(n, d) float32, unit length."""
        tokens = self.tokenizer(list(texts)).to(self.device)  # type: ignore[operator]
        with plain_attention(self.device):
            return F.normalize(self.network.encode_text(tokens).float(), dim=-1)

    @torch.inference_mode()
    def class_weights(
        self, class_names: Sequence[str], templates: Sequence[str] | Sequence[Callable[[str], str]]
    ) -> Tensor:
        """(d, classes) float32, unit columns: open_clip's own zero-shot classifier over `templates` of the name (at "{}")."""
        with plain_attention(self.device):
            weights = open_clip.build_zero_shot_classifier(
                self.network, self.tokenizer, list(class_names), list(templates), device=self.device
            )
        return weights.float().clone()

    def save(self, folder: Path, tower: dict[str, Tensor], text: dict[str, Tensor] | None = None) -> list[Path]:
        """As `open_clip.create_model("local-dir:FOLDER")` reads it: configuration, all weights, and a tokenizer of its own."""
        state = self.network.state_dict() | (text or {}) | {f"visual.{name}": value for name, value in tower.items()}
        write_json(
            folder / CLIP_CONFIG,
            {"model_cfg": self.config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(self.network)},
        )
        with durable_file(folder / CLIP_WEIGHTS) as path:
            save_file({name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, path)
        return [folder / CLIP_CONFIG, folder / CLIP_WEIGHTS, *self._save_tokenizer(folder)]

    def _save_tokenizer(self, folder: Path) -> list[Path]:
        """The files of a tokenizer of transformers; open_clip has others built in."""
        words = getattr(self.tokenizer, "tokenizer", None)
        if words is None:
            return []
        with tempfile.TemporaryDirectory() as apart:
            words.save_pretrained(apart)
            written = {path.name: path.read_bytes() for path in sorted(Path(apart).iterdir()) if path.is_file()}
        for name, data in written.items():
            write_bytes(folder / name, data)
        return [folder / name for name in written]


@torch.inference_mode()
def text_features(clip: Clip, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
    """(n, d) float32, unit length, in the order of `texts`."""
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    features = [clip.encode_text(part).cpu() for part in parts]
    return torch.cat(features).numpy() if features else np.zeros((0, clip.embed_dim), np.float32)
