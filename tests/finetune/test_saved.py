"""A saved model: its own library loads it by itself, and with its head it says what it said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from kinds import KINDS, OPEN_CLIP, TIMM, make_model
from torch.testing import assert_close

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, finetune
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.saved import Saved, load_saved, save_model
from retrieve_or_generate.models import ImageModel, load_model
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

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


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_reloaded_classifier_says_what_the_trained_one_said(kind: str, tmp_path: Path) -> None:
    classifier, model, saved = _save(kind, tmp_path)
    pixels = torch.from_numpy(_images(model, 4, seed=1).images)
    assert torch.equal(saved.classifier(pixels), classifier(pixels))
    assert not torch.allclose(saved.classifier.features(pixels), model.encode_image(pixels), atol=1e-3)
    assert saved.class_names == tuple(NAMES)


@pytest.mark.parametrize("kind", OPEN_CLIP)
@torch.inference_mode()
def test_plain_open_clip_loads_it_with_the_tower_replaced_and_the_text_tower_kept(kind: str, tmp_path: Path) -> None:
    classifier, model, _ = _save(kind, tmp_path)
    folder = f"local-dir:{tmp_path / 'model'}"
    network, _, preprocess = open_clip.create_model_and_transforms(folder, require_pretrained=True)
    network.eval()
    pixels = torch.from_numpy(_images(model, 2, seed=1).images)
    normalise = preprocess.transforms[-1]
    features = network.encode_image(normalise(pixels.float() / 255), normalize=True)
    assert_close(features, classifier.features(pixels), rtol=1e-4, atol=1e-5)
    before = load_model(str(tmp_path / kind))
    words = open_clip.get_tokenizer(folder)(NAMES)
    assert torch.equal(network.encode_text(words), before.network.encode_text(words))
    assert network.logit_scale == before.network.logit_scale


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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_fine_tuned_and_kept_as_it_was_tested(kind: str, tmp_path: Path) -> None:
    model = load_model(make_model(kind, tmp_path))
    parts = [_images(model, n, seed) for seed, n in enumerate((6, 6, 6))]
    task = TaskImages(model.class_weights(NAMES, TEMPLATES), *parts)
    settings = FinetuneSettings(updates=2, batch_size=6, evaluations=1, precision="float32")
    outcome = finetune(model, parts[0], task, settings, ProbeSettings(inverse_regularisation=(1.0,)), seed=0)
    before = Classifier(model, task.class_weights).state_dict()
    assert outcome.model.keys() == before.keys()
    assert not torch.equal(outcome.model["head.weight"], before["head.weight"])
    tower = [name for name, _ in Classifier(model, task.class_weights).tower.named_parameters()]
    moved = [name for name in tower if not torch.equal(outcome.model[f"tower.{name}"], before[f"tower.{name}"])]
    assert len(moved) > len(tower) / 2
    save_model(tmp_path / "model", model, outcome.model, NAMES, TEMPLATES)
    logits = load_saved(tmp_path / "model").classifier(torch.from_numpy(task.test.images)).detach().numpy()
    np.testing.assert_allclose(logits, outcome.zero_shot_logits, rtol=1e-4, atol=1e-4)


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
