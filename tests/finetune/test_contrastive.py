from __future__ import annotations

import dataclasses
from pathlib import Path

import open_clip
import pytest
import torch
from colours import make_clip

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, finetune, recipe
from retrieve_or_generate.finetune.contrastive import Paired
from retrieve_or_generate.finetune.draws import Draws
from retrieve_or_generate.finetune.learner import Learner
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

NAMES, TEMPLATES = ("red", "green", "blue"), ("a {}", "some {} thing")
SETTINGS = FinetuneSettings(
    loss="contrastive", updates=6, batch_size=8, evaluations=1, learning_rates=(1e-3,), precision="float32"
)
PROBE = ProbeSettings(inverse_regularisation=(1.0,))


@pytest.fixture(scope="module")
def named(task: TaskImages) -> TaskImages:
    return dataclasses.replace(task, class_names=NAMES, templates=TEMPLATES)


def paired(clip: Clip, task: TaskImages) -> Paired:
    return Paired(clip, task.class_weights, NAMES, TEMPLATES)


def test_the_loss_is_open_clips(clip: Clip, task: TaskImages) -> None:
    model = paired(clip, task)
    images, captions = (torch.nn.functional.normalize(torch.randn(5, 128), dim=1) for _ in range(2))
    expected = open_clip.ClipLoss()(images, captions, model.text.logit_scale.exp())
    torch.testing.assert_close(model.contrast(images, captions), expected)


def test_captions_are_of_the_class_by_any_template(clip: Clip, task: TaskImages) -> None:
    model, labels = paired(clip, task), torch.tensor([0, 2] * 20)
    drawn = model.drawn_captions(labels, Draws(torch.Generator().manual_seed(0), 40))
    said = {tuple(row) for row in clip.tokenizer(["a red", "some red thing"]).tolist()}  # type: ignore[operator]
    assert {tuple(row) for row in drawn[::2].tolist()} == said
    assert not said & {tuple(row) for row in drawn[1::2].tolist()}


def test_passes_give_the_gradient_of_the_whole_batch(clip: Clip, named: TaskImages, train: LabelledImages) -> None:
    gradients, losses = [], []
    for most in (8, 3):
        model = paired(clip, named)
        learner = Learner(model, train, SETTINGS, recipe.plan(SETTINGS, 20), 1e-9, 1, most)
        learner.step()
        losses.append(learner.mean_loss())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert {"tower.proj", "text.text_projection", "text.logit_scale"} <= gradients[0].keys()
    assert "head.weight" not in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_logits_are_multiplied_by_a_hundred_at_most(clip: Clip, named: TaskImages, train: LabelledImages) -> None:
    model = paired(clip, named)
    with torch.no_grad():
        model.text.logit_scale.fill_(5.0)
    Learner(model, train, SETTINGS, recipe.plan(SETTINGS, 20), 1e-9, 1).step()
    assert model.text.logit_scale.exp().item() == pytest.approx(100)


def test_both_towers_learn_and_zero_shot_is_rebuilt_from_text(
    clip: Clip, named: TaskImages, train: LabelledImages
) -> None:
    settings = SETTINGS.model_copy(update={"updates": 15})
    outcome = finetune(clip, train, named, settings, PROBE, seed=1)
    assert outcome.zero_shot_accuracy > 0.9
    tuned = make_clip().network
    parts = {name.removeprefix("text."): value for name, value in outcome.model.items() if name.startswith("text.")}
    assert any(not torch.equal(value, tuned.state_dict()[name]) for name, value in parts.items() if "resblocks" in name)
    tower = {f"visual.{name[6:]}": value for name, value in outcome.model.items() if name.startswith("tower.")}
    tuned.load_state_dict(parts | tower)
    with torch.inference_mode():
        weights = open_clip.build_zero_shot_classifier(tuned, clip.tokenizer, list(NAMES), list(TEMPLATES))
        pixels = clip.normalise(torch.from_numpy(named.test.images))
        expected = tuned.encode_image(pixels, normalize=True) @ weights * tuned.logit_scale.exp()
    torch.testing.assert_close(torch.from_numpy(outcome.zero_shot_logits), expected, rtol=1e-3, atol=1e-3)


def test_mixtures_with_the_weights_before_have_a_head_of_their_own(
    clip: Clip, named: TaskImages, train: LabelledImages
) -> None:
    settings = SETTINGS.model_copy(update={"wise_ft": (0.0, 1.0)})
    mixed, plain = (finetune(clip, train, named, each, PROBE, seed=1) for each in (settings, SETTINGS))
    shelf = finetune(clip, None, named, SETTINGS, PROBE, seed=1)
    losses = [row["zero_shot_val_loss"] for row in (*mixed.history[:2], shelf.history[0], plain.history[0])]
    assert losses[:2] == losses[2:]


def test_both_towers_are_saved(clip: Clip, named: TaskImages, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from retrieve_or_generate.finetune.saved import save_model

    model = paired(clip, named)
    with torch.no_grad():
        model.text.text_projection += 1
    save_model(tmp_path, clip, model.state_dict(), NAMES, TEMPLATES)
    saved = load_file(tmp_path / "open_clip_model.safetensors")
    torch.testing.assert_close(saved["text_projection"], clip.network.text_projection.detach() + 1)
    assert saved.keys() == clip.network.state_dict().keys()


def test_a_task_without_names_is_refused(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    with pytest.raises(UsageError, match=r"loss=contrastive needs the class names and templates of the task"):
        finetune(clip, train, task, SETTINGS, PROBE, seed=1)
