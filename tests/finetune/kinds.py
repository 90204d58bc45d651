"""Image models of every kind, small and with random weights: folders as their libraries write them, and files of weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

_VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP = {
    "vit": {"embed_dim": 24, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "quickgelu": {"embed_dim": 24, "vision_cfg": _VIT, "text_cfg": _TEXT, "quick_gelu": True},
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": _TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "coca": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": _VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": _TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": _TEXT | {"attn_pooler_heads": 2},
    },
}
"""What `open_clip_config.json` holds as `model_cfg`."""
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
TIMM = ("test_vit", "test_resnet", "test_convnext")
KINDS = (*OPEN_CLIP, *TIMM)


@contextmanager
def words_read_once() -> Iterator[None]:
    """open_clip's tokenizer reads half a second long through its 49,408 words; models of one context length share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("open_clip.factory.SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


def make_model(kind: str, folder: Path) -> str:
    """A model of this kind below `folder`; its name for `load_model`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return (
            _open_clip_folder(kind, folder / kind) if kind in OPEN_CLIP else f"timm:{kind}/{_timm_file(kind, folder)}"
        )


def _open_clip_folder(kind: str, folder: Path) -> str:
    folder.mkdir(parents=True)
    config = {"model_cfg": OPEN_CLIP[kind], "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    network = open_clip.create_model(f"local-dir:{folder}")
    save_weights(network, folder / "open_clip_model.safetensors")
    return str(folder)


def _timm_file(kind: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    network = timm.create_model(kind, pretrained=False, num_classes=5)
    save_weights(network, folder / f"{kind}.safetensors")
    return folder / f"{kind}.safetensors"


def save_weights(network: torch.nn.Module, path: Path) -> None:
    """As safetensors, weights drawn anew where the library starts from zeros: what is never read would not be missed.

    Also where it starts from whatever lay in memory (CoCa's last projection).
    """
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in state.items():
        unset = name.endswith("text_decoder.text_projection")
        if value.is_floating_point() and value.ndim and (unset or not value.any()):
            value.normal_(std=0.05)
    save_file(state, path)
