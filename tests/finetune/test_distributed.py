"""Two processes make the updates of one, agree on all that they decide, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ranks
import shared_work
import torch
import torch.distributed as dist
from colours import coloured
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from shared_work import Updates

from retrieve_or_generate.errors import IncompleteError, UsageError
from retrieve_or_generate.finetune import LabelledImages, TrialOutcome, read_trial
from retrieve_or_generate.finetune.checkpoint import FOLDER, SEAL, Checkpoint
from retrieve_or_generate.finetune.distributed import ALONE, World
from retrieve_or_generate.finetune.mixing import joined
from retrieve_or_generate.finetune.processes import assembled, placed, together
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


def test_all_start_from_the_weights_of_the_first(pair: Ranks) -> None:
    first, second = pair(shared_work.trial_of_other_weights, PLAIN)
    assert_same(first, second)
    assert_close(first, shared_work.trial(ALONE, PLAIN))


def test_all_see_that_training_diverged(pair: Ranks) -> None:
    rates = {"learning_rates": (1e30, 1e-3), "warmup_fraction": 0.0, "evaluations": PLAIN.updates}
    first, second = pair(shared_work.trial, PLAIN.model_copy(update=rates))
    assert_same(first, second)
    assert first.history[0] == {"learning_rate": 1e30, "update": 1, "wise_ft": 1.0, "diverged": True}


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


def test_processes_that_find_different_checkpoints_say_so(pair: Ranks, tmp_path: Path) -> None:
    Checkpoint(tmp_path / "1", shared_work.KEY).save((0, 3), {})
    with pytest.raises(UsageError, match="find different data or checkpoints: all need a disk that they share"):
        pair(shared_work.loads_own, tmp_path)


def test_memory_that_ends_when_nothing_can_be_taken_back_ends_the_trial() -> None:
    both, store = ranks.start()
    try:
        with pytest.raises(IncompleteError, match="out of memory between the passes"):
            both(shared_work.short_at_the_last_step, PLAIN)
    finally:
        both.end()
        del store


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_dies_ends_the_others_with_one_line(rank: int) -> None:
    started = time.monotonic()
    words = rf"process {rank} of 2: its worker process was ended by signal 9|a process that trains with this one ended"
    with pytest.raises(IncompleteError, match=words):
        together(partial(shared_work.dies, rank), 2)
    assert time.monotonic() - started < 60


def test_one_that_fails_is_heard_and_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        together(partial(shared_work.fails_alone, tmp_path), 2)
    assert "save where they are" not in capfd.readouterr().err


def test_gradients_are_added_and_what_nobody_has_stays_none(pair: Ranks) -> None:
    for gradients in pair(shared_work.summed):
        assert gradients == [[3.0, 6.0], [5.0, 6.0], None]


def test_each_process_gets_an_image_of_a_batch(pair: Ranks) -> None:
    with pytest.raises(UsageError, match="2 processes for batches of 1 images: start fewer"):
        pair(shared_work.trial, PLAIN.model_copy(update={"batch_size": 1}))


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
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, value in placed(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words), assembled(device):
        pass


ROG = (sys.executable, "-m", "retrieve_or_generate")
FEW = ("--set", "tasks=[textures]", "--set", "sources=[retrieved]")


@pytest.fixture(scope="module")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "textures"
    subprocess.run([*ROG, "retrieve", "--task", "textures", "--out", folder, *FEW], check=True)
    return folder


def finetuned(image_set: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", "--train", str(image_set), "--scale", "16", "--out", str(out), *more]


@pytest.mark.slow
def test_torchrun_starts_them_and_one_of_them_speaks(image_set: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", ROG[2])
    short = ("--set", "finetune.updates=4", "--set", "finetune.evaluations=1", "--set", "finetune.precision=float32")
    ends = []
    for name, words in {
        "torchrun": [*torchrun, *finetuned(image_set, tmp_path / "torchrun", *short)],
        "two": [*ROG, *finetuned(image_set, tmp_path / "two", *short, "--processes", "2")],
        "one": [*ROG, *finetuned(image_set, tmp_path / "one", *short)],
    }.items():
        ended = subprocess.run(words, check=True, capture_output=True, text=True)
        assert ended.stdout.count("zero_shot_accuracy") == 1
        ends.append(read_trial(tmp_path / name))
    by_torchrun, by_rog, alone = ends
    assert by_torchrun is not None
    assert by_rog is not None
    assert alone is not None
    assert by_torchrun.history == by_rog.history
    assert by_torchrun.predictions.equals(by_rog.predictions)
    assert [end.record["processes"] for end in (by_torchrun, by_rog, alone)] == [2, 2, 1]
    assert by_rog.config == alone.config
    assert by_rog.history[0]["train_loss"] == pytest.approx(alone.history[0]["train_loss"], rel=1e-4)
    mistaken = subprocess.run(
        [*torchrun, "finetune", "--task", "textores", "--out", tmp_path / "no"], capture_output=True, text=True
    )
    assert mistaken.returncode
    assert mistaken.stderr.count("rog: unknown task 'textores'; did you mean 'textures'?") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_ends_all(image_set: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Terminated, they save once and end with 143; killed, the other says in a line that it cannot go on."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    long = ("--set", "finetune.updates=4000", "--set", "finetune.checkpoint_every=3", "--set", "finetune.evaluations=1")
    words = [*ROG, *finetuned(image_set, tmp_path / "trial", *long)]
    processes = [
        subprocess.Popen(words, env=os.environ | placed(rank, 2, store.port), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    while not (tmp_path / "trial" / FOLDER / SEAL).exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(number)
    told = [process.communicate()[1].splitlines() for process in processes]
    said = [[line for line in lines if not line.startswith("updates: ")] for lines in told]
    codes = [process.returncode for process in processes]
    assert sorted(path.suffix for path in (tmp_path / "trial" / FOLDER).iterdir()) == [".json", ".pt"]
    if number == signal.SIGTERM:
        goes_on = "rog: terminated; what is finished is kept, and the same command goes on from there"
        assert (codes, said) == ([143, 143], [[goes_on], []])
    else:
        assert codes == [3, -signal.SIGKILL]
        assert said[0] == [
            "rog: a process that trains with this one ended; what was saved last is kept, and the same command goes on from there"
        ]


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["cross_entropy", "contrastive"])
def test_two_gpus_make_the_updates_of_one(image_set: Path, tmp_path: Path, loss: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    short = ("--set", "finetune.updates=8", "--set", "finetune.precision=float32", "--set", f"finetune.loss={loss}")
    losses = []
    for processes in ("1", "2"):
        words = finetuned(image_set, tmp_path / processes, *short, "--device", "cuda", "--processes", processes)
        subprocess.run([*ROG, *words], check=True)
        trial = read_trial(tmp_path / processes)
        assert trial is not None
        losses.append([row["train_loss"] for row in trial.history if "train_loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
