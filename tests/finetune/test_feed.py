"""Batches, wherever the set lies: the same images in the same order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import coloured

from retrieve_or_generate.finetune import LabelledImages, TaskImages, feed, finetune, recipe
from retrieve_or_generate.finetune.data import Chosen, Joined, chosen, together
from retrieve_or_generate.finetune.feed import Feed, in_order, lives_on_device
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

CPU = torch.device("cpu")
IMAGES = coloured(37, seed=5).images


@pytest.fixture
def mapped(tmp_path: Path) -> np.memmap:
    np.save(tmp_path / "images.npy", IMAGES)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def orders(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.permutation(len(IMAGES))[: 1 + number % 9] for number in range(count)]


@pytest.mark.parametrize("resident", [True, False])
def test_every_batch_is_what_was_asked_for_in_turn(mapped: np.memmap, resident: bool) -> None:
    rows = orders(23)
    for images in (IMAGES, mapped, Chosen(mapped, np.arange(37))):
        given = list(Feed(images, iter(rows), CPU, resident))
        assert len(given) == 23
        for (theirs, batch), asked in zip(given, rows, strict=True):
            assert np.array_equal(theirs, asked)
            assert batch.dtype == torch.uint8
            assert np.array_equal(batch.numpy(), IMAGES[asked])


def test_gathering_goes_ahead_and_no_further(mapped: np.memmap) -> None:
    asked = []

    def told() -> Iterator[np.ndarray]:
        for rows in orders(50):
            asked.append(rows)
            yield rows

    fed = Feed(mapped, told(), CPU)
    assert not asked  # so that a trial that is gone on with can skip what it had
    next(fed)
    assert len(asked) == feed.AHEAD + 1
    assert threading.active_count() <= 1 + feed.AHEAD


def test_the_wait_for_images_is_counted(mapped: np.memmap, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = Feed._gathered

    def slow(self: Feed, rows: np.ndarray) -> object:
        time.sleep(0.05)
        return gathered(self, rows)

    monkeypatch.setattr(Feed, "_gathered", slow)
    fed = Feed(mapped, iter(orders(2)), CPU)
    next(fed)
    assert 0.03 < fed.waited < 5
    resident = Feed(IMAGES, iter(orders(2)), CPU)
    next(resident)
    assert resident.waited == 0


def test_what_is_in_memory_lives_on_a_cpu_and_what_is_mapped_does_not(mapped: np.memmap) -> None:
    assert lives_on_device(IMAGES, CPU)
    assert not lives_on_device(mapped, CPU)
    assert not lives_on_device(Chosen(mapped, np.arange(3)), CPU)


def test_a_gpu_takes_half_of_what_is_free_what_torch_keeps_counted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"mem_get_info": (IMAGES.nbytes, 0), "memory_reserved": 2 * IMAGES.nbytes}
    for name, bytes_ in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, bytes_=bytes_: bytes_)
    for allocated, lives in ((IMAGES.nbytes, True), (IMAGES.nbytes + 1, False)):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _, bytes_=allocated: bytes_)
        assert lives_on_device(IMAGES, torch.device("cuda")) is lives


def test_rows_of_what_is_mapped_are_read_when_asked_for(mapped: np.memmap) -> None:
    rows = np.array([5, 2, 30, 2])
    view = chosen(mapped, rows)
    assert isinstance(view, Chosen)
    assert isinstance(chosen(IMAGES, rows), np.ndarray)
    assert view.shape == (4, 3, 32, 32)
    assert (len(view), view.ndim, view.dtype) == (4, 4, np.uint8)
    assert np.array_equal(np.asarray(view), IMAGES[rows])
    assert np.array_equal(view[1:3], IMAGES[rows][1:3])
    assert np.array_equal(view[np.array([3, 0])], IMAGES[rows][[3, 0]])


def test_sets_that_are_mapped_are_joined_where_they_lie(mapped: np.memmap) -> None:
    parts = [Chosen(mapped, np.array([3, 1])), IMAGES[:4], mapped[20:25]]
    joined, whole = together(parts), np.concatenate([np.asarray(part) for part in parts])
    assert isinstance(joined, Joined)
    assert isinstance(together([IMAGES[:2], IMAGES[:3]]), np.ndarray)
    assert (len(joined), joined.shape, joined.ndim, joined.dtype) == (11, whole.shape, 4, np.uint8)
    for rows in (np.array([10, 0, 5, 1, 2, 2]), np.array([], np.int64), slice(1, 8), slice(None)):
        assert np.array_equal(joined[rows], whole[rows])
    assert np.array_equal(np.asarray(joined), whole)
    assert not lives_on_device(joined, CPU)


def test_in_order_is_every_image_once(mapped: np.memmap) -> None:
    for images in (IMAGES, mapped):
        parts = list(in_order(images, 10, CPU))
        assert [len(part) for part in parts] == [10, 10, 10, 7]
        assert np.array_equal(torch.cat(parts).numpy(), IMAGES)
    assert [len(part) for part in in_order(mapped[:10], 10, CPU)] == [10]


@pytest.mark.parametrize("recipe_name", ["equal_updates", "paper"])
def test_a_trial_on_mapped_images_has_the_bits_of_one_in_memory(
    clip: Clip, task: TaskImages, tmp_path: Path, recipe_name: str
) -> None:
    train = coloured(30, seed=4)
    np.save(tmp_path / "train.npy", train.images)
    apart = Chosen(np.load(tmp_path / "train.npy", mmap_mode="r"), np.arange(30))
    settings = FinetuneSettings(updates=3, batch_size=8, learning_rates=(1e-3,)).model_copy(
        update={"recipe": recipe_name, "epochs": 1}
    )
    outcomes = [
        finetune(clip, LabelledImages(images, train.labels), task, settings, ProbeSettings(), seed=1)
        for images in (train.images, apart)
    ]
    assert outcomes[0].history == outcomes[1].history
    assert np.array_equal(outcomes[0].zero_shot_logits, outcomes[1].zero_shot_logits)
    assert outcomes[0].stall_seconds == 0 < outcomes[1].stall_seconds < outcomes[1].wall_seconds


def test_images_may_be_larger_than_the_model_takes(clip: Clip, task: TaskImages) -> None:
    small = coloured(30, seed=4)
    large = LabelledImages(small.images.repeat(2, axis=2).repeat(2, axis=3), small.labels)
    for changes in ({"recipe": "paper", "epochs": 1}, {"updates": 3}, {"updates": 3, "flip": True}):
        settings = FinetuneSettings(batch_size=8, learning_rates=(1e-3,), working_size=64, **changes)
        outcome = finetune(clip, large, task, settings, ProbeSettings(), seed=1)
        assert outcome.updates == recipe.plan(settings, 30).updates
        assert np.isfinite(outcome.zero_shot_logits).all()


@pytest.mark.gpu
def test_on_a_gpu_both_roads_give_the_same_images(mapped: np.memmap) -> None:
    device, rows = torch.device("cuda"), orders(40)
    for resident in (True, False):
        for (_, batch), asked in zip(Feed(mapped, iter(rows), device, resident), rows, strict=True):
            assert batch.is_cuda
            assert np.array_equal(batch.cpu().numpy(), IMAGES[asked])
    assert np.array_equal(torch.cat(list(in_order(mapped, 10, device))).cpu().numpy(), IMAGES)
