"""A folder of pictures, and a model of random weights that both tools load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from sidecar import ARCHITECTURE, ClipRetrieval

from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pixels import encode_jpeg, encode_png

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # what open_clip takes for it


def pictures(count: int) -> list[np.ndarray]:
    """Smooth random pictures of several sizes; the last is nearly the first."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(count - 1):
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 4, 5)).astype(np.float32))
        size = (240 + 8 * (number % 5), 250 + 16 * (number % 3))
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255)
        made.append(smooth[0].permute(1, 2, 0).numpy().astype(np.uint8))
    return [*made, np.clip(made[0].astype(np.int16) + 1, 0, 255).astype(np.uint8)]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG and PNG files in folders of folders."""
    folder = tmp_path_factory.mktemp("images")
    for number, picture in enumerate(pictures(48)):
        place = folder / f"part {number % 2}" / f"{number:03d}{'.png' if number % 3 else '.jpg'}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((encode_png if number % 3 else encode_jpeg)(picture))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, in the form that both tools load."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = open_clip.create_model(ARCHITECTURE)
    for name, parameter in network.named_parameters():
        if name.endswith(("weight", "proj")) and parameter.ndim > 1:
            parameter.data *= 2  # at its birth a tower gives all pictures nearly one vector
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {
        "model_cfg": open_clip.get_model_config(ARCHITECTURE),
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def clip(model_folder: Path) -> Clip:
    return load_clip(str(model_folder))


@pytest.fixture(scope="session")
def clip_retrieval(model_folder: Path) -> ClipRetrieval:
    return ClipRetrieval(f"open_clip:{ARCHITECTURE}/{model_folder / 'open_clip_model.safetensors'}")
