from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from colours import coloured

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.evaluate.linear_probe import linear_probe
from retrieve_or_generate.finetune import LabelledImages, TaskImages, TrialOutcome, finetune
from retrieve_or_generate.finetune.classifier import Classifier, features_of
from retrieve_or_generate.models import Clip, image_features
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

SHORT = FinetuneSettings(updates=6, batch_size=8, evaluations=3, learning_rates=(1e-3,), precision="float32")
PROBE = ProbeSettings(inverse_regularisation=(1.0, 100.0))


def same(a: TrialOutcome, b: TrialOutcome) -> bool:
    """Equal to the last bit."""
    return (
        a.history == b.history
        and np.array_equal(a.zero_shot_logits, b.zero_shot_logits)
        and np.array_equal(a.linear_probe_probabilities, b.linear_probe_probabilities)
        and all(torch.equal(value, b.model[name]) for name, value in a.model.items())
    )


def test_without_training_images_the_model_is_measured_as_it_is(clip: Clip, task: TaskImages) -> None:
    outcome = finetune(clip, None, task, SHORT, PROBE, seed=1)
    assert (outcome.n_train, outcome.updates, outcome.images_seen, len(outcome.history)) == (0, 0, 0, 3)
    train_x, val_x, test_x = (image_features(clip, part.images) for part in (task.train, task.val, task.test))
    logits = clip.network.logit_scale.exp().item() * test_x @ task.class_weights.numpy()
    np.testing.assert_allclose(outcome.zero_shot_logits, logits, rtol=1e-3, atol=1e-4)
    probed = linear_probe(train_x, task.train.labels, val_x, task.val.labels, test_x, 3, PROBE)
    np.testing.assert_allclose(outcome.linear_probe_probabilities, probed.probabilities, atol=1e-3)
    assert outcome.linear_probe_accuracy == (probed.predictions == task.test.labels).mean()
    assert same(outcome, finetune(clip, None, task, SHORT, PROBE, seed=2))


def test_training_learns_and_leaves_the_model_given_as_it_was(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    settings = SHORT.model_copy(update={"updates": 15})
    outcome = finetune(clip, train, task, settings, PROBE, seed=1)
    assert outcome.zero_shot_accuracy > 0.9 > finetune(clip, None, task, SHORT, PROBE, seed=1).zero_shot_accuracy
    assert (outcome.n_train, outcome.updates, outcome.images_seen) == (20, 15, 15 * 8)
    assert outcome.wall_seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.parameters())


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}, {"recipe": "paper", "epochs": 2}])
def test_equal_seeds_give_equal_bits_and_other_seeds_others(
    clip: Clip, task: TaskImages, train: LabelledImages, changes: dict[str, object]
) -> None:
    settings = SHORT.model_copy(update={"updates": 3, **changes})
    first, second, other = (finetune(clip, train, task, settings, PROBE, seed=seed) for seed in (1, 1, 2))
    assert same(first, second)
    assert not same(first, other)


def test_validation_alone_chooses(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    """Other test images: the same history, the same choice, the same model."""
    other = dataclasses.replace(task, test=coloured(30, seed=9))
    one, two = (finetune(clip, train, given, SHORT, PROBE, seed=1) for given in (task, other))
    assert one.history == two.history
    assert all(torch.equal(value, two.model[name]) for name, value in one.model.items())


def test_each_use_gets_the_rate_and_moment_that_validation_prefers(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    settings = SHORT.model_copy(update={"learning_rates": (1e-9, 1e-3)})
    outcome = finetune(clip, train, task, settings, PROBE, seed=1)
    *looks, zero_shot, probed = outcome.history
    assert [(look["learning_rate"], look["update"]) for look in looks] == [
        (r, u) for r in (1e-9, 1e-3) for u in (2, 4, 6)
    ]
    assert outcome.images_seen == 2 * 6 * 8
    for choice, use in ((zero_shot, "zero_shot"), (probed, "linear_probe")):
        best = max(looks, key=lambda look: (look[f"{use}_val_accuracy"], -look[f"{use}_val_loss"]))
        at = {"learning_rate": best["learning_rate"], "update": best["update"], "wise_ft": 1.0}
        assert choice == {"chosen_for": use} | at
    assert zero_shot["learning_rate"] == 1e-3


def test_the_model_kept_is_the_one_whose_numbers_are_told(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    outcome = finetune(clip, train, task, SHORT, PROBE, seed=1)
    classifier = Classifier(clip, task.class_weights)
    classifier.load_state_dict(outcome.model)
    with torch.inference_mode():
        logits = classifier.head(features_of(classifier, task.test.images)).numpy()
    np.testing.assert_array_equal(logits, outcome.zero_shot_logits)


def test_a_rate_at_which_training_diverges_is_logged_and_passed_over(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    settings = SHORT.model_copy(update={"learning_rates": (1e30, 1e-3)})
    outcome = finetune(clip, train, task, settings, PROBE, seed=1)
    assert outcome.history[0] | {"update": 2} == {"learning_rate": 1e30, "update": 2, "diverged": True}
    assert {row["learning_rate"] for row in outcome.history[1:]} == {1e-3}
    with pytest.raises(UsageError, match=r"diverged at every learning rate \(1e\+30\); set smaller"):
        finetune(clip, train, task, SHORT.model_copy(update={"learning_rates": (1e30,)}), PROBE, seed=1)


def test_a_last_update_that_goes_too_far_is_seen_at_the_look_after_it(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    """No loss tells of it yet."""
    settings = SHORT.model_copy(
        update={"learning_rates": (1e30, 1e-3), "evaluations": 6, "warmup_fraction": 0.0, "wise_ft": (0.5, 1.0)}
    )
    first, second, third, *others = finetune(clip, train, task, settings, PROBE, seed=1).history
    for row, alpha in ((first, 0.5), (second, 1.0)):
        assert row == {"learning_rate": 1e30, "update": 1, "wise_ft": alpha, "diverged": True}
    assert third == {"learning_rate": 1e30, "update": 2, "diverged": True}
    assert {row["learning_rate"] for row in others} == {1e-3}


def test_a_model_that_gives_no_numbers_did_not_diverge(clip: Clip, task: TaskImages) -> None:
    broken = copy.deepcopy(clip)
    with torch.no_grad():
        next(broken.tower.parameters()).fill_(torch.nan)
    with pytest.raises(UsageError, match="what it makes of the task's images are no numbers; take another model"):
        finetune(broken, None, task, SHORT, PROBE, seed=1)


def test_compiling_is_for_a_gpu(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    with pytest.raises(UsageError, match=r"finetune\.compile is for a GPU \(--device cuda\)"):
        finetune(clip, train, task, SHORT.model_copy(update={"compile": True}), PROBE, seed=1)


def test_refuses_images_that_do_not_fit(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    small = LabelledImages(train.images[:, :, :16, :16], train.labels)
    beyond = LabelledImages(train.images, train.labels + 2)
    empty = LabelledImages(train.images[:0], train.labels[:0])
    for given, words in (
        (small, r"training images are \(3, 16, 16\), but the model takes \(3, 32, 32\)"),
        (beyond, "training labels go from 2 to 4, but there are 3 classes"),
        (empty, "no training images"),
    ):
        with pytest.raises(UsageError, match=words):
            finetune(clip, given, task, SHORT, PROBE, seed=1)
    with pytest.raises(UsageError, match="must be uint8"):
        LabelledImages(train.images.astype(np.float32), train.labels)
    with pytest.raises(UsageError, match="2 keys for 20 images"):
        LabelledImages(train.images, train.labels, ("a", "b"))
