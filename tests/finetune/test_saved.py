"""A saved model: its own library loads it by itself, and with its head it says what it said.

That plain open_clip does, for every kind, test_conformance.py asks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from kinds import TIMM, make_model
from torch.testing import assert_close

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune import LabelledImages
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.saved import Saved, load_saved, save_model
from retrieve_or_generate.models import ImageModel, load_model

NAMES, TEMPLATES = ["red", "green", "blue"], ["a {}.", "some {} thing"]


def _images(model: ImageModel, n: int, seed: int) -> LabelledImages:
    """Noise around one colour a class, at the size of `model`."""
    rng = np.random.default_rng(seed)
    labels, shape = np.arange(n) % 3, (n, 3, model.image_size, model.image_size)
    colours = np.eye(3)[labels] * 120 + 60
    images = (colours[:, :, None, None] + rng.normal(0, 30, shape)).clip(0, 255).astype(np.uint8)
    return LabelledImages(images, labels)


def _trained(model: ImageModel) -> Classifier:
    """A classifier whose tower and head are no longer what they were."""
    classifier = Classifier(model, model.class_weights(NAMES, TEMPLATES))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return classifier


def _save(kind: str, folder: Path) -> tuple[Classifier, ImageModel, Saved]:
    model = load_model(make_model(kind, folder))
    classifier = _trained(model)
    save_model(folder / "model", model, classifier.state_dict(), NAMES, TEMPLATES)
    return classifier, model, load_saved(folder / "model")


@pytest.mark.parametrize("kind", ["vit", "coca", "test_resnet"])
@torch.inference_mode()
def test_the_reloaded_classifier_says_what_the_trained_one_said(kind: str, tmp_path: Path) -> None:
    classifier, model, saved = _save(kind, tmp_path)
    pixels = torch.from_numpy(_images(model, 4, seed=1).images)
    assert torch.equal(saved.classifier(pixels), classifier(pixels))
    assert not torch.allclose(saved.classifier.features(pixels), model.encode_image(pixels), atol=1e-3)
    assert saved.class_names == tuple(NAMES)


@pytest.mark.parametrize("kind", TIMM)
@torch.inference_mode()
def test_plain_timm_loads_it(kind: str, tmp_path: Path) -> None:
    classifier, model, _ = _save(kind, tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(network)
    pixels = torch.from_numpy(_images(model, 2, seed=1).images)
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    features = torch.nn.functional.normalize(network((pixels.float() / 255 - mean) / std), dim=1)
    assert_close(features, classifier.features(pixels), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_of_its_own_goes_with_the_model(tmp_path: Path) -> None:
    pocket = load_model("pocket")
    save_model(tmp_path, pocket, _trained(pocket).state_dict(), NAMES, TEMPLATES)
    again = load_model(str(tmp_path))
    assert torch.equal(again.class_weights(NAMES, TEMPLATES), pocket.class_weights(NAMES, TEMPLATES))


def test_a_folder_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no head.safetensors; rog finetune --save-model writes model and head to TRIAL/model"
    ):
        load_saved(Path(make_model("vit", tmp_path)))


def test_a_head_of_another_model(tmp_path: Path) -> None:
    for kind, folder in (("vit", "a"), ("test_resnet", "b")):
        _save(kind, tmp_path / folder)
    (tmp_path / "b/model/head.safetensors").replace(tmp_path / "a/model/head.safetensors")
    with pytest.raises(IntegrityError, match=r"head.safetensors is \(3, \d+\), for 3 classes and features of 24"):
        load_saved(tmp_path / "a/model")
