"""One update at a time: batches in passes, and weights between those before and after."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, finetune, recipe
from retrieve_or_generate.finetune.classifier import Classifier, features_of
from retrieve_or_generate.finetune.learner import Learner
from retrieve_or_generate.finetune.train import interpolated
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

SHORT = FinetuneSettings(updates=3, batch_size=10, evaluations=1, learning_rates=(1e-3,), precision="float32")
PROBE = ProbeSettings(inverse_regularisation=(1.0,))


def fits_only(monkeypatch: pytest.MonkeyPatch, most: int, refuse: Callable[[], Exception]) -> list[int]:
    """A classifier that trains on so many images at once; the sizes that were tried."""
    forward, tried = Classifier.forward, []

    def limited(self: Classifier, pixels: torch.Tensor) -> torch.Tensor:
        tried.append(len(pixels))
        if len(pixels) > most:
            raise refuse()
        return forward(self, pixels)

    monkeypatch.setattr(Classifier, "forward", limited)
    return tried


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory."),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
        MemoryError,
    ],
)
def test_out_of_memory_the_batch_stays_and_goes_through_in_smaller_passes(
    clip: Clip,
    task: TaskImages,
    train: LabelledImages,
    refuse: Callable[[], Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = SHORT.model_copy(update={"learning_rates": (1e-3, 1e-9)})
    whole = finetune(clip, train, task, settings, PROBE, seed=1)
    tried = fits_only(monkeypatch, 3, refuse)
    passes = finetune(clip, train, task, settings, PROBE, seed=1)
    assert tried == [10, 5, 3, 3, 3, 1, *[3, 3, 3, 1] * 5]
    noted = [row for row in passes.history if "images_per_pass" in row]
    assert noted == [{"update": 1, "images_per_pass": 3}]
    assert capsys.readouterr().err.count("too small for a batch of 10; it goes through in passes of 3") == 1
    losses = [[row["train_loss"] for row in one.history if "train_loss" in row] for one in (passes, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, value in whole.model.items():
        torch.testing.assert_close(passes.model[name], value, rtol=1e-2, atol=1e-3, msg=name)
    assert passes.images_seen == whole.images_seen


def test_passes_give_the_gradient_of_the_whole_batch(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    gradients = []
    for most in (10, 4):
        classifier = Classifier(clip, task.class_weights)
        Learner(classifier, train, SHORT, recipe.plan(SHORT, 20), 1e-9, 1, most).step()
        gradients.append({name: p.grad for name, p in classifier.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_what_does_not_fit_one_image_at_a_time_or_is_another_mistake_comes_through(
    clip: Clip, task: TaskImages, train: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fits_only(monkeypatch, 0, MemoryError)
    with pytest.raises(MemoryError):
        finetune(clip, train, task, SHORT, PROBE, seed=1)
    assert tried == [10, 5, 3, 2, 1]
    fits_only(monkeypatch, 3, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        finetune(clip, train, task, SHORT, PROBE, seed=1)


def test_out_of_memory_for_the_update_itself_no_smaller_pass_is_tried(
    clip: Clip, task: TaskImages, train: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments of some weights would be there and those of others not."""
    zeros, made = torch.zeros_like, []

    def scarce(*given: object, **how: object) -> torch.Tensor:
        made.append(1)
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros(*given, **how)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "zeros_like", scarce)
    with pytest.raises(
        IncompleteError, match="out of memory between the passes of a batch; free some, or set a smaller"
    ):
        finetune(clip, train, task, SHORT, PROBE, seed=1)
    assert len(made) == 3


def test_the_head_has_its_factor_of_the_rate(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    settings = SHORT.model_copy(update={"head_learning_rate_factor": 7.0})
    learner = Learner(Classifier(clip, task.class_weights), train, settings, recipe.plan(settings, 20), 1e-3, 1)
    assert learner.descent.rates == [1e-3, pytest.approx(7e-3)]
    assert [group["params"][0].shape for group in learner.descent.optimizer.param_groups][1] == (3, 128)


def test_a_learner_that_is_over_leaves_no_images_behind(clip: Clip, task: TaskImages, train: LabelledImages) -> None:
    """At once: those of the next rate need the room on a GPU."""
    gc.disable()
    try:
        learner = Learner(Classifier(clip, task.class_weights), train, SHORT, recipe.plan(SHORT, 20), 1e-3, 1)
        learner.step()
        feed = weakref.ref(learner.feed)
        del learner
        assert feed() is None
    finally:
        gc.enable()


def test_weights_between_before_and_after_are_chosen_on_val(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    settings = FinetuneSettings(**SHORT.model_dump() | {"wise_ft": [0.0, 0.5, 1.0]})
    outcome, plain = (finetune(clip, train, task, each, PROBE, seed=1) for each in (settings, SHORT))
    *looks, zero_shot, _ = outcome.history
    assert [look["wise_ft"] for look in looks] == [0.0, 0.5, 1.0]
    best = max(looks, key=lambda look: (look["zero_shot_val_accuracy"], -look["zero_shot_val_loss"]))
    assert zero_shot["wise_ft"] == best["wise_ft"]
    assert looks[2] == plain.history[0]  # α = 1 is what was tuned, and looking changes nothing
    start = Classifier(clip, task.class_weights)
    with torch.inference_mode():
        shelf = start.head(features_of(start, task.val.images)).numpy()
    assert looks[0]["zero_shot_val_accuracy"] == (shelf.argmax(1) == task.val.labels).mean()
    before = start.state_dict()
    for name, value in outcome.model.items():
        between = (1 - best["wise_ft"]) * before[name] + best["wise_ft"] * plain.model[name]
        torch.testing.assert_close(value, between, msg=name)


def test_training_goes_on_from_what_was_tuned_not_from_a_mixture(
    clip: Clip, task: TaskImages, train: LabelledImages
) -> None:
    settings = SHORT.model_copy(update={"evaluations": 3})
    mixed = settings.model_copy(update={"wise_ft": (0.5,)})
    plain, looked_between = (finetune(clip, train, task, each, PROBE, seed=1).history[:3] for each in (settings, mixed))
    assert [row["train_loss"] for row in looked_between] == [row["train_loss"] for row in plain]


def test_counts_are_not_mixed() -> None:
    start = {"w": torch.zeros(2), "seen": torch.tensor(3)}
    tuned = {"w": torch.ones(2), "seen": torch.tensor(7)}
    mixed = interpolated(start, tuned, 0.25)
    assert (mixed["w"].tolist(), mixed["seen"].item()) == ([0.25, 0.25], 7)


def test_one_share_needs_no_list_and_shares_are_shares() -> None:
    assert FinetuneSettings(wise_ft=0.5).wise_ft == (0.5,)
    assert FinetuneSettings().wise_ft == (1.0,)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        FinetuneSettings(wise_ft=2)
