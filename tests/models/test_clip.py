"""Models: what open_clip gives is what `Clip` gives, and what cannot be loaded says so in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.models import Clip, image_features, load_clip, text_features
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.tasks import load_task
from retrieve_or_generate.weights import POCKET_WEIGHTS, clip_fingerprint


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("pocket")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return decode_all(load_task("textures").split("val").images[:20], 32)


def test_plain_open_clip_gives_the_same_features(clip: Clip, pixels: np.ndarray) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{POCKET_WEIGHTS / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{POCKET_WEIGHTS / 'clip'}")
    model.eval()
    with torch.inference_mode():
        normalised = (torch.from_numpy(pixels).float() / 255 - clip.mean) / clip.std
        theirs = model.encode_image(normalised, normalize=True).numpy()
        words = model.encode_text(tokenizer(["a striped texture."]), normalize=True).numpy()
    assert np.allclose(image_features(clip, pixels), theirs, atol=1e-5)
    assert np.allclose(text_features(clip, ["a striped texture."]), words, atol=1e-5)
    assert preprocess is not None


def test_features_are_of_unit_length_whatever_the_batch(clip: Clip, pixels: np.ndarray) -> None:
    features = image_features(clip, pixels, batch_size=7)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert np.allclose(features, image_features(clip, pixels, batch_size=20), atol=1e-6)
    assert image_features(clip, pixels[:0]).shape == text_features(clip, []).shape == (0, clip.embed_dim)


def test_bytes_and_floats_are_the_same_pixels(clip: Clip, pixels: np.ndarray) -> None:
    as_bytes = torch.from_numpy(pixels[:2])
    with torch.inference_mode():
        assert torch.equal(clip.encode_image(as_bytes), clip.encode_image(as_bytes.float() / 255))


def test_class_weights_are_open_clips_classifier(clip: Clip) -> None:
    task = load_task("textures")
    weights = clip.class_weights(task.class_names, task.templates)
    assert weights.shape == (clip.embed_dim, len(task.class_names))
    first = text_features(clip, [template.replace("{}", task.class_names[0]) for template in task.templates]).mean(0)
    assert np.allclose(weights[:, 0].numpy(), first / np.linalg.norm(first), atol=1e-5)


def test_off_the_shelf_leaves_room_to_rise_and_to_fall(clip: Clip) -> None:
    for name in ("digits", "textures", "aircraft"):
        task = load_task(name)
        test = task.split("test")
        features = image_features(clip, decode_all(test.images, clip.image_size))
        weights = clip.class_weights(task.class_names, task.templates).numpy()
        assert 0.25 < ((features @ weights).argmax(1) == test.labels).mean() < 0.85


@pytest.mark.parametrize("name", ["ViT-B-99/openai", "no-such-folder", "ViT-B-16", "ViT-B-16/no_such_tag"])
def test_an_unknown_model(name: str) -> None:
    with pytest.raises(UsageError, match=rf"model '{name}'"):
        load_clip(name)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no open_clip_config.json; a model folder is what"):
        load_clip(str(tmp_path))


def test_a_folder_of_another_shape(tmp_path: Path) -> None:
    folder = shutil.copytree(POCKET_WEIGHTS / "clip", tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 64
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        IntegrityError,
        match=r"\(visual.class_embedding is \[128\] there, \[64\] here\)",
    ):
        load_clip(str(folder))


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"])
def test_the_fingerprint_follows_weights_and_how_they_are_used(name: str, tmp_path: Path) -> None:
    """Equal weights with another normalisation, activation or vocabulary give other features."""
    folder = shutil.copytree(POCKET_WEIGHTS / "clip", tmp_path / "clip")
    before = clip_fingerprint(str(folder))
    (folder / "README.md").write_text("of no account")
    assert clip_fingerprint(str(folder)) == before
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert clip_fingerprint(str(folder)) != before


def test_the_pocket_clip_is_called_after_its_weights() -> None:
    """As the keys of finished work have it."""
    weights = POCKET_WEIGHTS / "clip/open_clip_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest().startswith(clip_fingerprint("pocket"))


@pytest.mark.parametrize("name", ["ViT-B-16/laion2b_s34b_b88k", "hf-hub:laion/nothing"])
def test_a_hub_that_does_not_answer_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(UsageError, match=rf"model '{name}': its hub does not answer") as told:
        load_clip(name)
    assert "\n" not in str(told.value)
    assert caplog.records == []
