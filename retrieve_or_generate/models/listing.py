"""Which models have a name, and what one of them is."""

from __future__ import annotations

from typing import Any

import open_clip
import timm

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models.clip import Clip
from retrieve_or_generate.models.loading import check_names, load_model
from retrieve_or_generate.models.timm_model import TimmModel
from retrieve_or_generate.store import sha256_of
from retrieve_or_generate.weights import find_model


def model_names() -> list[str]:
    """`pocket`, what open_clip downloads, then what timm does; none that would be refused for its activation."""
    published = ["/".join(pair) for pair in open_clip.list_pretrained()]
    return ["pocket", *filter(_is_taken, published), *(f"timm:{name}" for name in timm.list_pretrained())]


def _is_taken(name: str) -> bool:
    try:
        check_names(find_model(name))
    except UsageError:
        return False
    return True


def describe(name: str) -> dict[str, Any]:
    """What the model called `name` is; it is loaded, so its weights are known to be readable and of its architecture."""
    files, model = find_model(name), load_model(name)
    weights = {"weights": str(files.file), "sha256": sha256_of(files.file)} if files.file else {}
    return {
        "model": name,
        "library": files.library,
        "image_size": model.image_size,
        "mean": [round(value, 6) for value in model.mean.flatten().tolist()],
        "std": [round(value, 6) for value in model.std.flatten().tolist()],
        "embed_dim": model.embed_dim,
        "image_parameters": sum(parameter.numel() for parameter in model.tower.parameters()),
        "text_tower": isinstance(model, Clip),
        **({"quick_gelu": bool((model.config or {}).get("quick_gelu"))} if isinstance(model, Clip) else {}),
        **({"classes": model.n_classes} if isinstance(model, TimmModel) else {}),
        **weights,
        "fingerprint": model.fingerprint,
    }
