from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retrieve_or_generate.finetune import LabelledImages, TaskImages, finetune, recipe
from retrieve_or_generate.finetune.adversarial import as_floats, attacked, random_start
from retrieve_or_generate.finetune.augment import shifted
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.draws import Draws
from retrieve_or_generate.finetune.learner import Learner
from retrieve_or_generate.models import Clip
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import AdversarialSettings, FinetuneSettings, ProbeSettings

ATTACK = AdversarialSettings(epsilon=8, steps=3)
SETTINGS = FinetuneSettings(
    adversarial=ATTACK, updates=2, batch_size=8, evaluations=1, learning_rates=(1e-3,), precision="float32"
)


def test_an_attack_stays_within_reach_and_raises_the_loss_of_every_image(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    classifier, labels = Classifier(clip, task.class_weights), torch.from_numpy(train.labels)
    pixels = as_floats(torch.from_numpy(train.images))
    start = random_start(pixels, ATTACK, Draws(torch.Generator().manual_seed(0), len(pixels)))
    moved = attacked(classifier, pixels, start, labels, ATTACK)
    assert (moved - pixels).abs().max() <= 8 / 255 + 1e-6
    assert ((moved >= 0) & (moved <= 1)).all()
    with torch.no_grad():
        before, after = (F.cross_entropy(classifier(x), labels, reduction="none") for x in (pixels, moved))
    assert (after > before).all()
    assert all(parameter.grad is None for parameter in classifier.parameters())
    alone = attacked(classifier, pixels[:1], start[:1], labels[:1], ATTACK)
    assert (alone - moved[:1]).abs().gt(1e-6).float().mean() < 0.01  # a sign may turn where the gradient is 0


def test_attacks_start_anywhere_within_reach() -> None:
    grey = torch.full((50, 3, 8, 8), 0.5)
    moved = random_start(grey, ATTACK, Draws(torch.Generator().manual_seed(0), 50)) - grey
    assert moved.abs().max() <= 8 / 255 + 1e-6
    assert moved.quantile(torch.tensor([0.05, 0.5, 0.95])).mul(255).tolist() == pytest.approx([-7.2, 0, 7.2], abs=0.3)


def test_one_full_step_is_the_fast_gradient_sign(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    classifier, labels = Classifier(clip, task.class_weights), torch.from_numpy(train.labels)
    pixels = as_floats(torch.from_numpy(train.images))
    tried = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(tried), labels), tried)
    expected = (pixels + 2 / 255 * gradient.sign()).clamp(0, 1)
    one = AdversarialSettings(epsilon=2, steps=1, step_size=2)
    moved = attacked(classifier, pixels, pixels, labels, one)
    assert (moved - expected).abs().gt(1e-6).float().mean() < 0.01


def test_the_loss_is_that_of_the_batch_attacked_from_a_start_drawn_after_its_augmentation(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    rows = next(recipe.batches(SETTINGS, 20, 1))
    draws = Draws(torch.Generator().manual_seed(seed_for("finetune", "augmentation", 1)), len(rows))
    pixels = as_floats(shifted(torch.from_numpy(train.images[rows]), draws))
    start, labels = random_start(pixels, ATTACK, draws), torch.from_numpy(train.labels[rows])
    classifier = Classifier(clip, task.class_weights)
    moved = attacked(classifier, pixels, start, labels, ATTACK)
    expected = F.cross_entropy(classifier(moved), labels)
    learner = Learner(classifier, train, SETTINGS, recipe.plan(SETTINGS, 20), 1e-9, 1)
    learner.step()
    assert learner.mean_loss() == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_the_attacked_images_that_are_trained_on(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    plain = SETTINGS.model_copy(update={"adversarial": None})
    losses = []
    for settings, most in ((plain, 8), (SETTINGS, 8), (SETTINGS, 3)):
        learner = Learner(
            Classifier(clip, task.class_weights), train, settings, recipe.plan(settings, 20), 1e-9, 1, most
        )
        learner.step()
        losses.append(learner.mean_loss())
    assert losses[1] > losses[0] + 0.05
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_what_was_trained_so_withstands_an_attack_that_it_has_not_seen(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    attack = AdversarialSettings(epsilon=56, steps=3)  # the colours lie 140 apart
    images, labels = as_floats(torch.from_numpy(task.test.images)), torch.from_numpy(task.test.labels)
    right = []
    for adversarial in (None, attack):
        settings = SETTINGS.model_copy(update={"adversarial": adversarial, "batch_size": 10})
        classifier = Classifier(clip, task.class_weights)
        learner = Learner(classifier, train, settings, recipe.Plan(12, 1, (12,)), 1e-3, 1)
        for _ in range(12):
            learner.step()
        harder = AdversarialSettings(epsilon=56, steps=8)
        start = random_start(images, harder, Draws(torch.Generator().manual_seed(9), len(images)))
        moved = attacked(classifier, images, start, labels, harder)
        with torch.no_grad():
            right.append((classifier(moved).argmax(1) == labels).float().mean())
    assert right[0] < 0.45
    assert right[1] > 0.6


def test_an_update_goes_on_from_a_state_to_the_same_bits(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    def learner() -> Learner:
        return Learner(Classifier(clip, task.class_weights), train, SETTINGS, recipe.plan(SETTINGS, 20), 1e-3, 1)

    whole, before, after = learner(), learner(), learner()
    before.step()
    after.resume(copy.deepcopy(before.state()))
    for one, updates in ((whole, 2), (after, 1)):
        for _ in range(updates):
            one.step()
    assert whole.mean_loss() == after.mean_loss()
    for name, value in whole.classifier.state_dict().items():
        assert torch.equal(value, after.classifier.state_dict()[name]), name


def test_out_of_memory_in_an_attack_makes_passes_smaller(
    clip: Clip, task: TaskImages, train: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, tried = Classifier.forward, []

    def limited(self: Classifier, pixels: torch.Tensor) -> torch.Tensor:
        tried.append(len(pixels))
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixels)

    monkeypatch.setattr(Classifier, "forward", limited)
    learner = Learner(Classifier(clip, task.class_weights), train, SETTINGS, recipe.plan(SETTINGS, 20), 1e-3, 1)
    learner.step()
    assert tried == [8, *[4] * 8]  # in each of two passes three steps of the attack and the update's own


def test_equal_seeds_give_equal_bits(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    probe = ProbeSettings(inverse_regularisation=(1.0,))
    one, two = (finetune(clip, train, task, SETTINGS, probe, seed=1).zero_shot_logits for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_settings() -> None:
    assert FinetuneSettings(adversarial=4).adversarial == AdversarialSettings(epsilon=4)
    assert AdversarialSettings(epsilon=4, steps=5).length == pytest.approx(2)  # 2.5 ε over the steps
    assert AdversarialSettings(epsilon=4, step_size=1).length == 1
    with pytest.raises(ValueError, match="adversarial goes with loss: cross_entropy"):
        FinetuneSettings(adversarial=4, loss="contrastive")
    with pytest.raises(ValueError, match="adversarial"):
        FinetuneSettings(adversarial=True)
