"""What every kind of model is and does, whatever its library and architecture; checked against the library used by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from kinds import KINDS, OPEN_CLIP, TIMM, make_model
from torch.testing import assert_close

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models import Clip, ImageModel, TimmModel, image_features, load_clip, load_model
from retrieve_or_generate.weights import clip_fingerprint

NAMES = ["red car", "green tree", "blue whale"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return load_model(make_model(request.param, tmp_path_factory.mktemp("models")))


def _pixels(model: ImageModel, n: int = 3) -> torch.Tensor:
    shape = (n, 3, model.image_size, model.image_size)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def test_it_comes_in_evaluation_mode_and_on_the_device(model: ImageModel) -> None:
    assert not any(part.training for part in model.modules())
    assert model.device == torch.device("cpu")
    assert model.fingerprint == clip_fingerprint(model.name)


@torch.inference_mode()
def test_features_are_of_unit_length_and_each_image_s_own(model: ImageModel) -> None:
    pixels = _pixels(model)
    features = model.encode_image(pixels)
    assert features.shape == (3, model.embed_dim)
    assert features.dtype == torch.float32
    assert_close(features.norm(dim=1), torch.ones(3))
    assert_close(torch.from_numpy(image_features(model, pixels.numpy(), batch_size=2)), features)
    assert not torch.allclose(features[0], features[1], atol=1e-4)


@torch.inference_mode()
def test_bytes_and_floats_are_the_same_pixels(model: ImageModel) -> None:
    pixels = _pixels(model, 2)
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels.float() / 255))


def test_class_weights_are_unit_columns_that_follow_from_the_class_names(model: ImageModel) -> None:
    weights = model.class_weights(NAMES, ["a photo of a {}.", "a {}."])
    assert weights.shape == (model.embed_dim, 3)
    assert_close(weights.norm(dim=0), torch.ones(3))
    assert_close(model.class_weights(NAMES[::-1], ["a photo of a {}.", "a {}."]), weights.flip(1))


@pytest.mark.parametrize("kind", OPEN_CLIP)
@torch.inference_mode()
def test_it_gives_what_open_clip_gives(kind: str, tmp_path: Path) -> None:
    clip = load_clip(make_model(kind, tmp_path))
    network, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / kind}")
    network.eval()
    tokenizer, pixels = open_clip.get_tokenizer(f"local-dir:{tmp_path / kind}"), _pixels(clip)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    normalised = (pixels.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert_close(clip.encode_image(pixels), network.encode_image(normalised, normalize=True))
    assert_close(clip.encode_text(NAMES), network.encode_text(tokenizer(NAMES), normalize=True))
    assert clip.logit_scale == pytest.approx(network.logit_scale.exp().item())


@pytest.mark.parametrize("kind", TIMM)
@torch.inference_mode()
def test_it_gives_what_timm_gives(kind: str, tmp_path: Path) -> None:
    name = make_model(kind, tmp_path)
    model = load_model(name)
    assert isinstance(model, TimmModel)
    network = timm.create_model(kind, checkpoint_path=str(tmp_path / f"{kind}.safetensors"), num_classes=5).eval()
    data = timm.data.resolve_model_data_config(network)
    pixels = _pixels(model)
    normalised = (pixels.float() / 255 - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(
        3, 1, 1
    )
    assert_close(model.logits(pixels), network(normalised), rtol=1e-4, atol=1e-5)
    assert (model.n_classes, model.image_size) == (5, data["input_size"][1])


def test_activations_make_a_difference(tmp_path: Path) -> None:
    quick, plain = (load_clip(make_model(kind, tmp_path)) for kind in ("quickgelu", "vit"))
    plain.network.load_state_dict(quick.network.state_dict())
    with torch.inference_mode():
        assert not torch.allclose(plain.encode_image(_pixels(plain)), quick.encode_image(_pixels(quick)), atol=1e-3)


def test_a_model_without_a_text_tower_neither_searches_nor_filters(tmp_path: Path) -> None:
    name = make_model("test_resnet", tmp_path)
    with pytest.raises(UsageError, match="has no text tower, so it can be fine-tuned, but neither search nor filter"):
        load_clip(name)


def test_a_clip_has_both_towers(tmp_path: Path) -> None:
    assert isinstance(load_model(make_model("vit", tmp_path)), Clip)


@pytest.mark.parametrize("is_tuned", [True, False])
def test_what_is_saved_holds_the_states_that_were_given(is_tuned: bool, tmp_path: Path) -> None:
    """The text tower's own where it was trained, else the model's; in either case the image tower's that was given."""
    clip = load_clip(make_model("vit", tmp_path))
    tower = {name: value + 1 for name, value in clip.tower.state_dict().items()}
    rest = {name: value for name, value in clip.network.state_dict().items() if not name.startswith("visual.")}
    tuned = {name: value + 2 for name, value in rest.items()}
    clip.save(tmp_path / "saved", tower, tuned if is_tuned else None)
    found = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").state_dict()
    assert_close(found, {f"visual.{name}": value for name, value in tower.items()} | (tuned if is_tuned else rest))


class _Scaled(torch.nn.Module):
    """A classifier with a linear head, and `factor` between its features and that head."""

    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012

    def __init__(self, factor: float):
        super().__init__()
        self.num_classes, self.factor = 2, factor
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
        self.head: torch.nn.Module = torch.nn.Linear(4, 2)

    def get_classifier(self) -> torch.nn.Module:
        return self.head

    def reset_classifier(self, classes: int) -> None:
        self.num_classes, self.head, self.factor = classes, torch.nn.Identity(), 1.0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.factor * self.body(pixels))


def test_what_lies_between_features_and_logits_must_be_the_head_alone() -> None:
    assert TimmModel("plain", _Scaled(1.0), "00").n_classes == 2
    with pytest.raises(UsageError, match="model 'scaled': its classes are not one linear layer over its features"):
        TimmModel("scaled", _Scaled(9.0), "00")
