"""Mixtures of two sources: which images, in which batches, with which loss."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import coloured

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, finetune, recipe
from retrieve_or_generate.finetune.augment import shifted
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.draws import Draws
from retrieve_or_generate.finetune.learner import Learner
from retrieve_or_generate.finetune.mixing import MixedImages, batches_of, joined
from retrieve_or_generate.models import Clip
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

SETTINGS = FinetuneSettings(updates=3, batch_size=7, evaluations=1, learning_rates=(1e-3,), precision="float32")


def test_joined_sets_are_one_set_and_one_part_is_itself(train: LabelledImages) -> None:
    other = coloured(6, seed=7)
    both = joined(train, other)
    assert type(both) is LabelledImages
    np.testing.assert_array_equal(both.images, np.concatenate([train.images, other.images]))
    assert both.labels.tolist() == [*train.labels, *other.labels]
    assert both.keys == train.keys + other.keys
    assert joined(train) is train
    assert joined(train, gamma=0.3) is train


@pytest.mark.parametrize("kind", ["equal_updates", "paper"])
def test_halves_of_a_batch_are_of_each_source_and_each_source_comes_round(train: LabelledImages, kind: str) -> None:
    mixed = joined(train, coloured(8, seed=7), gamma=0.25)  # 8 are no whole number of halves: passes run on
    order, weights = batches_of(mixed, FinetuneSettings(recipe=kind, batch_size=7), seed=1)
    drawn = list(itertools.islice(order, 10))
    assert all((rows[:4] < 20).all() and (rows[4:] >= 20).all() and len(rows) == 7 for rows in drawn)
    assert sorted(np.concatenate([rows[:4] for rows in drawn[:5]])) == list(range(20))
    assert sorted(np.concatenate([rows[4:] for rows in drawn])[:8]) == list(range(20, 28))
    assert weights is not None
    assert weights[:4].sum().item() == pytest.approx(0.25)
    assert weights[4:].sum().item() == pytest.approx(0.75)


def test_two_sources_of_one_size_do_not_come_in_one_order(train: LabelledImages) -> None:
    """Pairs of the same rows would meet in every pass."""
    rows = next(batches_of(joined(train, train, gamma=0.5), FinetuneSettings(batch_size=20), 1)[0])
    assert not np.array_equal(rows[:10], rows[10:] - 20)


@pytest.mark.parametrize("most", [7, 3])
def test_the_loss_is_gamma_of_the_firsts_and_the_rest_of_the_seconds(
    clip: Clip, task: TaskImages, train: LabelledImages, most: int
) -> None:
    mixed = joined(train, coloured(6, seed=7), gamma=0.25)
    rows = next(batches_of(mixed, SETTINGS, 1)[0])
    draw = torch.Generator().manual_seed(seed_for("finetune", "augmentation", 1))
    pixels, labels = (
        shifted(torch.from_numpy(mixed.images[rows]), Draws(draw, len(rows))),
        torch.from_numpy(mixed.labels[rows]),
    )
    expected, ours = (Classifier(clip, task.class_weights) for _ in range(2))
    logits = expected(pixels)
    loss = 0.25 * F.cross_entropy(logits[:4], labels[:4]) + 0.75 * F.cross_entropy(logits[4:], labels[4:])
    gradients = torch.autograd.grad(loss, list(expected.parameters()))
    learner = Learner(ours, mixed, SETTINGS, recipe.plan(SETTINGS, 26), 1e-9, 1, most)
    learner.step()
    assert learner.mean_loss() == pytest.approx(loss.item(), rel=1e-4)
    scale = torch.cat([g.flatten() for g in gradients]).norm().clamp_min(1)  # clipping to norm 1
    for (name, parameter), gradient in zip(ours.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / scale, rtol=1e-3, atol=1e-5, msg=name)


def test_a_mixture_goes_on_from_a_state_to_the_same_bits(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    mixed = joined(train, coloured(6, seed=7), gamma=0.25)

    def learner() -> Learner:
        return Learner(Classifier(clip, task.class_weights), mixed, SETTINGS, recipe.plan(SETTINGS, 26), 1e-3, 1)

    whole, before, after = learner(), learner(), learner()
    before.step()
    after.resume(copy.deepcopy(before.state()))
    for one, updates in ((whole, 3), (after, 2)):
        for _ in range(updates):
            one.step()
    assert whole.mean_loss() == after.mean_loss()
    for name, value in whole.classifier.state_dict().items():
        assert torch.equal(value, after.classifier.state_dict()[name]), name


def test_equal_seeds_give_equal_bits_and_gamma_matters(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    other, probe = coloured(6, seed=7), ProbeSettings(inverse_regularisation=(1.0,))
    logits = [
        finetune(clip, joined(train, other, gamma=gamma), task, SETTINGS, probe, seed=1).zero_shot_logits
        for gamma in (0.2, 0.2, 0.8)
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])


def test_a_mixture_without_two_halves_is_one_line(train: LabelledImages) -> None:
    with pytest.raises(UsageError, match=r"needs images of both sources, and finetune\.batch_size of 2 or more"):
        batches_of(joined(train, train, gamma=0.5), FinetuneSettings(batch_size=1), 1)
    with pytest.raises(UsageError, match="not 20 and 0 images"):
        batches_of(MixedImages(train.images, train.labels, train.keys, 20, 0.5), FinetuneSettings(batch_size=2), 1)
