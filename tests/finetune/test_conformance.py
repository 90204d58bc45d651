"""One suite over all that is trained on anything: task kinds × recipes × losses × model kinds.

Each trial makes two updates, is terminated during the first and gone on with, is measured, saved, and read back. By default every
model kind meets every recipe and loss, and every task is met; `-m slow` has the rest of the product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from kinds import KINDS, TIMM, make_model

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, TrialOutcome, finetune, recipe, task_images
from retrieve_or_generate.finetune.checkpoint import FOLDER, Checkpoint
from retrieve_or_generate.finetune.saved import load_saved, save_model
from retrieve_or_generate.models import ImageModel, load_model
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings
from retrieve_or_generate.tasks import Split, Task, load_task, task_names
from retrieve_or_generate.tasks.base import Reader
from retrieve_or_generate.tasks.templates import as_functions
from tests.tasks.miniatures import KINDS as LAYOUTS

TASKS = [*(kind for kind in LAYOUTS if kind != "whole_imagenet"), *task_names()]
RECIPES = {"equal_updates": {"updates": 2}, "paper": {"epochs": 1}}
LOSSES = ("cross_entropy", "contrastive")
PROBE = ProbeSettings(inverse_regularisation=(1.0,))
SEED = 3

_TRAINED = list(itertools.product(KINDS, RECIPES, LOSSES))
_DEFAULT = {(TASKS[place % len(TASKS)], *trained) for place, trained in enumerate(_TRAINED)}
CASES = [
    pytest.param(*case, marks=() if case in _DEFAULT else pytest.mark.slow)
    for case in ((task, *trained) for task in TASKS for trained in _TRAINED)
]


@dataclasses.dataclass(frozen=True)
class _Few:
    """A dozen images of a split at most, from all over it."""

    reader: Reader

    def read(self) -> Split:
        split = self.reader.read()
        return split.take(np.unique(np.linspace(0, len(split) - 1, 12).astype(np.int64)))


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ImageModel]:
    return functools.cache(lambda kind: load_model(make_model(kind, tmp_path_factory.mktemp("models"))))


@pytest.fixture(scope="module")
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    kind = request.param
    with pytest.MonkeyPatch.context() as patch:
        name = LAYOUTS[kind](tmp_path_factory.mktemp(kind), patch) if kind in LAYOUTS else kind
        whole = load_task(name)
        yield dataclasses.replace(whole, readers={split: _Few(reader) for split, reader in whole.readers.items()})


def _train(model: ImageModel) -> LabelledImages:
    """Seven images of three classes, no two the same."""
    shape = (7, 3, model.image_size, model.image_size)
    return LabelledImages(np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(7) % 3)


def _stopped(monkeypatch: pytest.MonkeyPatch, run: Callable[[], TrialOutcome]) -> TrialOutcome:
    """What `run` gives when it is terminated during its first update, and called again."""
    step = recipe.Descent.step

    def terminated(descent: recipe.Descent, losses: Iterable[torch.Tensor]) -> None:
        signal.raise_signal(signal.SIGTERM)
        step(descent, losses)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Descent, "step", terminated)
        with pytest.raises(SystemExit, match="143"):
            run()
    return run()


@pytest.mark.parametrize(("task", "kind", "recipe_name", "loss"), CASES, indirect=["task"])
def test_a_trial(
    task: Task,
    kind: str,
    recipe_name: str,
    loss: str,
    model_of: Callable[[str], ImageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(kind)
    images, train = task_images(task, model), _train(model)
    settings = FinetuneSettings(
        recipe=recipe_name,
        loss=loss,
        batch_size=4,
        learning_rates=(1e-3,),
        evaluations=1,
        precision="float32",
        **RECIPES[recipe_name],
    )
    run = functools.partial(finetune, model, train, images, settings, PROBE, seed=SEED)
    if loss == "contrastive" and kind in TIMM:
        with pytest.raises(UsageError, match=r"loss=contrastive trains a text tower, and .* has none: cross_entropy$"):
            run()
        return
    outcome = run()
    assert outcome.updates == 2
    _assert_same(_stopped(monkeypatch, lambda: run(checkpoint=Checkpoint(tmp_path / FOLDER, "a" * 16))), outcome)
    _assert_measured(outcome, images)
    _assert_moved(outcome, model)
    save_model(tmp_path / "model", model, outcome.model, task.class_names, task.templates)
    _assert_read_back(tmp_path / "model", outcome, images)
    if kind not in TIMM:
        _assert_plain_open_clip_reads(tmp_path / "model", outcome, images, model, loss)


def _assert_same(one: TrialOutcome, other: TrialOutcome) -> None:
    assert one.history == other.history
    assert one.model.keys() == other.model.keys()
    assert [name for name, value in one.model.items() if not torch.equal(value, other.model[name])] == []
    np.testing.assert_array_equal(one.zero_shot_logits, other.zero_shot_logits)
    np.testing.assert_array_equal(one.linear_probe_probabilities, other.linear_probe_probabilities)


def _assert_measured(outcome: TrialOutcome, images: TaskImages) -> None:
    shape = (len(images.test), images.n_classes)
    assert outcome.zero_shot_logits.shape == outcome.linear_probe_probabilities.shape == shape
    assert np.isfinite(outcome.zero_shot_logits).all()
    np.testing.assert_allclose(outcome.linear_probe_probabilities.sum(1), 1, atol=1e-4)
    assert all(0 <= value <= 1 for value in outcome.metrics.values())


def _assert_moved(outcome: TrialOutcome, model: ImageModel) -> None:
    """Most weights of the tower, but for what has no gradient."""
    before = model.tower.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, outcome.model[f"tower.{name}"])]
    assert len(moved) > len(list(model.tower.parameters())) / 2


def _assert_read_back(folder: Path, outcome: TrialOutcome, images: TaskImages) -> None:
    saved = load_saved(folder)
    assert saved.class_names == images.class_names
    with torch.inference_mode():
        logits = saved.classifier(torch.from_numpy(images.test.images))
    np.testing.assert_allclose(logits, outcome.zero_shot_logits, rtol=1e-3, atol=1e-3)


def _assert_plain_open_clip_reads(
    folder: Path, outcome: TrialOutcome, images: TaskImages, model: ImageModel, loss: str
) -> None:
    """The tower that was trained; the text tower as it was, or that of contrastive training, of which zero-shot is."""
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    pixels = preprocess.transforms[-1](torch.from_numpy(images.test.images).float() / 255)
    with torch.inference_mode():
        features = network.eval().encode_image(pixels, normalize=True)
    head, bias = outcome.model["head.weight"], outcome.model["head.bias"]
    if loss == "contrastive":
        templates = as_functions(images.templates)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        weights = open_clip.build_zero_shot_classifier(network, tokenizer, list(images.class_names), templates)
        head = weights.T * network.logit_scale.exp().detach()
    else:
        before, after = model.network.state_dict(), network.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("visual."))
    np.testing.assert_allclose(features @ head.T + bias, outcome.zero_shot_logits, rtol=1e-3, atol=1e-3)
