from __future__ import annotations

from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from colours import VISION, coloured, make_clip
from torch import nn

from retrieve_or_generate.finetune import TaskImages
from retrieve_or_generate.finetune.classifier import Classifier, class_token_embedding, features_of
from retrieve_or_generate.models import Clip

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}


def test_starts_as_the_zero_shot_classifier_of_open_clip(clip: Clip, task: TaskImages) -> None:
    pixels = torch.from_numpy(task.test.images[:8])
    with torch.inference_mode():
        weights = open_clip.build_zero_shot_classifier(
            clip.network, clip.tokenizer, ["red", "green", "blue"], ["a {}", "some {} thing"]
        )
        image = clip.network.encode_image(clip.normalise(pixels), normalize=True)
        expected = image @ weights * clip.network.logit_scale.exp()
        torch.testing.assert_close(Classifier(clip, task.class_weights)(pixels), expected, rtol=1e-4, atol=1e-4)


def test_features_are_those_of_the_model_whatever_the_batch(clip: Clip, task: TaskImages) -> None:
    classifier, images = Classifier(clip, task.class_weights), task.test.images
    whole, parts = features_of(classifier, images), features_of(classifier, images, batch_size=5)
    torch.testing.assert_close(whole, clip.encode_image(torch.from_numpy(images)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(images)))


@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.1}, {"no_ln_pre": True}, {"pos_embed_type": "sin_cos_2d"}])
def test_reading_the_class_token_only_changes_neither_output_nor_gradient(changes: dict[str, object]) -> None:
    tower = make_clip(vision=VISION | changes).network.visual
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for forward in (tower, lambda x: class_token_embedding(tower, x)):
        tower.zero_grad()
        output = forward(pixels)
        output.pow(2).sum().backward()
        results.append(
            (output.detach(), {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
        )
    (whole, gradients), (short, short_gradients) = results
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short_gradients, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vision", [VISION | {"pool_type": "avg"}, VISION | {"attentional_pool": True}, RESNET])
def test_other_towers_run_as_they_are(vision: dict[str, object]) -> None:
    clip = make_clip(vision=vision)
    pixels = torch.from_numpy(coloured(3, seed=0).images)
    classifier = Classifier(clip, torch.eye(128)[:, :3])
    torch.testing.assert_close(classifier.features(pixels), clip.encode_image(pixels))


def test_a_tower_that_gives_tokens_too_gives_its_pooled_output() -> None:
    class Both(nn.Module):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return pixels.mean((2, 3)), pixels

    pixels = torch.rand(2, 3, 4, 4)
    assert torch.equal(class_token_embedding(Both(), pixels), pixels.mean((2, 3)))


def test_any_width_of_features_will_do() -> None:
    """The released code of the paper fixed the probe at 512."""
    clip = make_clip(dim=96)
    classifier = Classifier(clip, torch.eye(96)[:, :7])
    assert classifier(torch.from_numpy(coloured(2, seed=0).images)).shape == (2, 7)


def test_bfloat16_is_close_where_the_processor_has_it(clip: Clip, task: TaskImages) -> None:
    features = [
        features_of(Classifier(clip, task.class_weights, p), task.test.images).numpy() for p in ("float32", "bfloat16")
    ]
    assert features[1].dtype == np.float32
    assert (features[0] * features[1]).sum(1).min() > 0.999


@pytest.mark.slow
@torch.inference_mode()
def test_zero_shot_logits_of_a_vit_b_16_are_open_clip_s() -> None:
    """Random weights: a head that starts as open_clip's own zero-shot classifier gives its logits at full size, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.create_model("ViT-B-16").eval()
    tokenizer, names = open_clip.get_tokenizer("ViT-B-16"), ["red", "green", "blue whale"]
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES[:2]
    clip = Clip("ViT-B-16", network, tokenizer, "0" * 16)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = Classifier(clip, clip.class_weights(names, templates))(pixels)
    weights = open_clip.build_zero_shot_classifier(network, tokenizer, names, templates)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    image = network.encode_image((pixels.float() / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(logits, image @ weights * network.logit_scale.exp(), rtol=1e-4, atol=1e-3)


def test_compiled_it_computes_the_same(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch as it would be for a GPU; what is made of the trace there takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = (Classifier(clip, torch.eye(128)[:, :3]) for _ in range(2))
    compiled.compile_tower()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    gradients = []
    for classifier in (plain, compiled):
        classifier(pixels).square().sum().backward()
        gradients.append(classifier.tower.conv1.weight.grad)
    torch.testing.assert_close(compiled(pixels), plain(pixels))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_last_images_of_a_set_are_not_worth_compiling(clip: Clip) -> None:
    classifier, compiled = Classifier(clip, torch.eye(128)[:, :3]), []

    def counted(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        compiled.append(len(pixels))
        return class_token_embedding(tower, pixels)

    images = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), np.uint8)
    expected = features_of(classifier, images, 4)
    classifier.embedding = counted
    torch.testing.assert_close(features_of(classifier, images, 4), expected)
    assert compiled == [4, 4]
