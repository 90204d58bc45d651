"""Two processes make the updates of one, agree on all that they decide, and end together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ranks
import shared_work
from colours import coloured
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from shared_work import Updates

from retrieve_or_generate.errors import IncompleteError, UsageError
from retrieve_or_generate.finetune import LabelledImages, TrialOutcome
from retrieve_or_generate.finetune.checkpoint import SEAL
from retrieve_or_generate.finetune.distributed import ALONE, World, assembled, together
from retrieve_or_generate.finetune.mixing import joined
from retrieve_or_generate.settings import AdversarialSettings, FinetuneSettings

PLAIN = FinetuneSettings(updates=6, batch_size=7, evaluations=2, learning_rates=(1e-3,), precision="float32")
KINDS = {
    "cross_entropy": PLAIN,
    "adversarial": PLAIN.model_copy(update={"adversarial": AdversarialSettings(epsilon=4, steps=2)}),
    "contrastive": PLAIN.model_copy(update={"loss": "contrastive"}),
    "paper": PLAIN.model_copy(update={"recipe": "paper", "epochs": 2, "batch_size": 5}),  # batches of 5, 5 and 1
    "paper, contrastive": PLAIN.model_copy(
        update={"recipe": "paper", "epochs": 2, "batch_size": 5, "loss": "contrastive"}
    ),
}

WEIGHED = joined(coloured(6, seed=4), coloured(5, seed=6), gamma=0.3)


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    both, store = ranks.start()
    yield both
    both.end()
    del store


def assert_same_weights(first: Updates, second: Updates, reference: Updates) -> None:
    """Bit for bit in both, and the reference's but for rounding.

    Rounding is all there is to the gradient of a key's bias, and AdamW makes steps of the full rate of it.
    """
    for name, weights in reference.weights.items():
        np.testing.assert_array_equal(first.weights[name], second.weights[name], err_msg=name)
        np.testing.assert_allclose(first.weights[name], weights, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [shared_work.TRAIN, WEIGHED], ids=["one source", "weighed"])
def test_they_make_the_updates_of_one(pair: Ranks, kind: str, train: LabelledImages) -> None:
    """Also where a batch has an image for one of them only."""
    alone = shared_work.updates(ALONE, KINDS[kind], 4, (), train)
    first, second = pair(shared_work.updates, KINDS[kind], 4, (), train)
    assert first.losses == second.losses == pytest.approx(alone.losses, rel=1e-4)
    assert first.gradient.keys() == alone.gradient.keys() == second.gradient.keys()
    for name, gradient in alone.gradient.items():
        np.testing.assert_allclose(first.gradient[name], gradient, rtol=1e-3, atol=1e-5, err_msg=name)
    assert_same_weights(first, second, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [(9, 1), (2, 9), (2, 1)])
def test_where_one_is_short_of_memory_all_take_smaller_passes(pair: Ranks, kind: str, most: tuple[int, int]) -> None:
    roomy, _ = pair(shared_work.updates, KINDS[kind], 4)
    first, second = pair(shared_work.updates, KINDS[kind], 4, most)
    assert first.images_per_pass == second.images_per_pass == min(most)
    assert first.losses == second.losses == pytest.approx(roomy.losses, rel=1e-4)
    assert_same_weights(first, second, roomy)


@pytest.mark.parametrize(("images", "batch_size"), [(9, 2), (8, 4), (3, 4)])
def test_features_are_those_of_one_to_the_bit_and_lie_on_the_first(pair: Ranks, images: int, batch_size: int) -> None:
    first, second = pair(shared_work.features, images, batch_size)
    np.testing.assert_array_equal(first, shared_work.features(ALONE, images, batch_size))
    assert second.shape == (0, 128)


def assert_same(one: TrialOutcome, other: TrialOutcome) -> None:
    assert one.history == other.history
    assert one.images_seen == other.images_seen
    np.testing.assert_array_equal(one.zero_shot_logits, other.zero_shot_logits)
    np.testing.assert_array_equal(one.linear_probe_probabilities, other.linear_probe_probabilities)
    for name, value in one.model.items():
        np.testing.assert_array_equal(value, other.model[name], err_msg=name)


def assert_close(one: TrialOutcome, other: TrialOutcome) -> None:
    for ours, theirs in zip(one.history, other.history, strict=True):
        names = [name for name in theirs if name.endswith("loss")]
        assert ours | dict.fromkeys(names) == theirs | dict.fromkeys(names)
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-3)
    assert one.images_seen == other.images_seen
    np.testing.assert_allclose(one.zero_shot_logits, other.zero_shot_logits, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(one.linear_probe_probabilities, other.linear_probe_probabilities, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", ["cross_entropy", "contrastive"])
def test_stopped_at_every_update_they_end_in_the_same_bits(pair: Ranks, loss: str, tmp_path: Path) -> None:
    settings = PLAIN.model_copy(update={"loss": loss, "learning_rates": (1e-3, 3e-4)})
    whole, also = pair(shared_work.trial, settings)
    assert_same(whole, also)
    assert whole.processes == 2
    assert_close(whole, shared_work.trial(ALONE, settings))
    for stop in range(2 * PLAIN.updates):
        with pytest.raises(SystemExit) as ended:
            pair(shared_work.trial, settings, tmp_path, (stop % 2, 1))
        assert ended.value.code == 143
        assert sorted(path.name for path in tmp_path.iterdir())[0] == SEAL
        assert len(list(tmp_path.iterdir())) == 2
    first, second = pair(shared_work.trial, settings, tmp_path)
    assert_same(first, whole)
    assert_same(second, whole)


def test_one_goes_on_from_two_and_two_from_one(pair: Ranks, tmp_path: Path) -> None:
    whole = shared_work.trial(ALONE, PLAIN)
    with pytest.raises(SystemExit):
        pair(shared_work.trial, PLAIN, tmp_path, (1, 2))
    with pytest.raises(SystemExit):
        shared_work.trial(ALONE, PLAIN, tmp_path, (0, 2))
    first, second = pair(shared_work.trial, PLAIN, tmp_path)
    assert_close(first, whole)
    assert_same(first, second)


def test_all_are_told_the_mistake_that_the_first_finds(pair: Ranks) -> None:
    with pytest.raises(UsageError, match="found by process 0"):
        pair(shared_work.mistaken)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_dies_ends_the_others_with_one_line(rank: int) -> None:
    started = time.monotonic()
    words = rf"process {rank} of 2: its worker process was ended by signal 9|a process that trains with this one ended"
    with pytest.raises(IncompleteError, match=words):
        together(partial(shared_work.dies, rank), 2)
    assert time.monotonic() - started < 60


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_even_and_the_first_is_the_largest(count: int, size: int) -> None:
    shares = [World(rank, size).part(count) for rank in range(size)]
    rows = [list(range(count))[share] for share in shares]
    assert [row for share in rows for row in share] == list(range(count))
    assert len(rows[0]) == World(0, size).largest_part(count)
    assert len(rows[0]) - len(rows[-1]) <= 1


def test_alone_without_torchrun() -> None:
    with assembled("cuda:7") as (world, device):
        assert (world, device) == (ALONE, "cuda:7")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:0", "--device cuda:0 is one for all processes; --device cuda gives each a GPU of its own"),
        ("cuda", "2 processes on this machine, which has 0 GPUs; start one for each"),
    ],
)
def test_each_has_a_gpu_of_its_own(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieve_or_generate.finetune import distributed

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, value in distributed.placed(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words), assembled(device):
        pass
