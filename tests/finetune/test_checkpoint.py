"""A trial that was stopped at any update and gone on with ends in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import coloured, make_clip

from retrieve_or_generate import api
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.finetune import LabelledImages, TaskImages, Trial, TrialOutcome, finetune, recipe
from retrieve_or_generate.finetune.checkpoint import FOLDER, SEAL, Checkpoint, is_only_checkpoint
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.mixing import joined
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings
from retrieve_or_generate.store import LOCK

SMALL: dict[str, object] = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
PROBE = ProbeSettings(inverse_regularisation=(1.0,))
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def small() -> tuple[Clip, TaskImages, LabelledImages]:
    clip = make_clip(vision=SMALL)
    weights = clip.class_weights(["red", "green", "blue"], ["a {}"])
    return clip, TaskImages(weights, *(coloured(9, seed=seed) for seed in (1, 2, 3))), coloured(10, seed=4)


def train(
    small: tuple[Clip, TaskImages, LabelledImages], settings: FinetuneSettings, checkpoint: Checkpoint | None = None
) -> TrialOutcome:
    clip, task, images = small
    return finetune(clip, images, task, settings, PROBE, seed=1, checkpoint=checkpoint)


def assert_same(one: TrialOutcome, other: TrialOutcome) -> None:
    assert one.history == other.history
    assert one.images_seen == other.images_seen
    np.testing.assert_array_equal(one.zero_shot_logits, other.zero_shot_logits)
    np.testing.assert_array_equal(one.linear_probe_probabilities, other.linear_probe_probabilities)
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())


@pytest.mark.parametrize("length", [{"updates": 25}, {"recipe": "paper", "epochs": 3}])
def test_stopped_at_every_one_of_fifty_updates_it_ends_in_the_same_bits(
    small: tuple[Clip, TaskImages, LabelledImages],
    length: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A SIGTERM during each update, at two learning rates with looks in between; after each a new call."""
    known = {"batch_size": 4, "evaluations": 3, "learning_rates": (1e-3, 3e-4), "precision": "float32"}
    settings = FinetuneSettings(**{**known, **length})
    whole = train(small, settings)
    step, stops = recipe.Descent.step, 0

    def terminated(descent: recipe.Descent, given: Iterable[torch.Tensor]) -> None:
        nonlocal stops
        stops += 1
        os.kill(os.getpid(), signal.SIGTERM)
        step(descent, given)

    monkeypatch.setattr(recipe.Descent, "step", terminated)
    outcome = None
    while outcome is None:
        with suppress(SystemExit):
            outcome = train(small, settings, Checkpoint(tmp_path / FOLDER, KEY))
    assert stops == 2 * whole.updates == (50 if "updates" in length else 18)
    assert_same(outcome, whole)


def test_all_that_a_trial_may_be_asked_for_at_once_goes_on_to_the_same_bits(
    small: tuple[Clip, TaskImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weighed mixture, attacked and mirrored, looked at between weights, in bfloat16 and in passes."""
    known = {"recipe": "paper", "epochs": 2, "batch_size": 5, "evaluations": 2, "learning_rates": (1e-3, 1e-4)}
    settings = FinetuneSettings(**known, wise_ft=(0.5,), adversarial=4, flip=True, precision="bfloat16")
    clip, task, images = small
    asked = clip, task, joined(images, coloured(7, seed=8), gamma=0.3)
    step, forward, stops = recipe.Descent.step, Classifier.forward, 0

    def limited(classifier: Classifier, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(classifier, pixels)

    def terminated(descent: recipe.Descent, given: Iterable[torch.Tensor]) -> None:
        step(descent, given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Classifier, "forward", limited)
    whole = train(asked, settings)
    monkeypatch.setattr(recipe.Descent, "step", terminated)
    outcome = None
    while outcome is None:
        try:
            outcome = train(asked, settings, Checkpoint(tmp_path / FOLDER, KEY))
        except SystemExit:
            stops += 1
    assert stops == 2 * whole.updates == 16
    assert_same(outcome, whole)


def test_saved_now_and_then_it_goes_on_from_what_was_saved_last(
    small: tuple[Clip, TaskImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FinetuneSettings(updates=10, batch_size=4, evaluations=2, learning_rates=(1e-3,), precision="float32")
    whole, step, made = train(small, settings), recipe.Descent.step, []

    def dies(descent: recipe.Descent, given: Iterable[torch.Tensor]) -> None:
        made.append(descent.update)
        if len(made) == 9:
            raise KeyboardInterrupt
        step(descent, given)

    monkeypatch.setattr(recipe.Descent, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small, settings, Checkpoint(tmp_path / FOLDER, KEY, every=3))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [SEAL, "state-0-6.pt"]
    checkpoint = Checkpoint(tmp_path / FOLDER, KEY, every=3)
    state = checkpoint.load()
    assert state is not None
    assert 0 < state["wall_seconds"] < 1000
    checkpoint.save((0, 6), state | {"wall_seconds": 2000.0, "stall_seconds": 1000.0})
    outcome = train(small, settings, checkpoint)
    assert_same(outcome, whole)
    assert (outcome.wall_seconds > 2000, outcome.stall_seconds) == (True, 1000)  # of all processes that took part
    assert made == [*range(9), *range(6, 10)]
    checkpoint.remove()
    assert not (tmp_path / FOLDER).exists()


def test_passes_that_memory_allowed_are_gone_on_with(
    small: tuple[Clip, TaskImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FinetuneSettings(updates=4, batch_size=4, evaluations=1, learning_rates=(1e-3,), precision="float32")
    step, forward = recipe.Descent.step, Classifier.forward

    def limited(classifier: Classifier, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(classifier, pixels)

    def terminated(descent: recipe.Descent, given: Iterable[torch.Tensor]) -> None:
        step(descent, given)
        if descent.update == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Classifier, "forward", limited)
    whole = train(small, settings)
    monkeypatch.setattr(recipe.Descent, "step", terminated)
    with pytest.raises(SystemExit):
        train(small, settings, Checkpoint(tmp_path / FOLDER, KEY))
    assert_same(train(small, settings, Checkpoint(tmp_path / FOLDER, KEY)), whole)


def test_only_a_whole_state_of_the_same_trial_is_gone_on_from(tmp_path: Path) -> None:
    mine, other = (Checkpoint(tmp_path / FOLDER, key) for key in (KEY, KEY[::-1]))
    assert mine.load() is None
    mine.save((0, 3), {"x": torch.arange(5), "text": "kept"})
    state = mine.load()
    assert state is not None
    assert (state["x"].tolist(), state["text"]) == ([0, 1, 2, 3, 4], "kept")
    assert other.load() is None
    assert is_only_checkpoint(tmp_path, mine)
    assert not is_only_checkpoint(tmp_path, other)
    (tmp_path / FOLDER / ".tmp-state").write_bytes(b"half")  # of a process that was killed while it wrote
    mine.save((0, 4), {"x": torch.zeros(1)})
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [SEAL, "state-0-4.pt"]
    path = tmp_path / FOLDER / "state-0-4.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"state-0-4.pt: .* bytes, but .* remove it, and the trial begins anew"):
        mine.load()
    (tmp_path / ".tmp-config.json").touch()  # of a process that was killed as it began to write the trial
    assert is_only_checkpoint(tmp_path, mine)
    (tmp_path / "config.json").touch()
    assert not is_only_checkpoint(tmp_path, mine)


def test_what_was_saved_is_not_saved_again(tmp_path: Path) -> None:
    def never() -> dict[str, object]:
        pytest.fail("nothing is due")

    checkpoint = Checkpoint(tmp_path / FOLDER, KEY, every=3)
    checkpoint.pause((0, 0), never)
    checkpoint.pause((0, 3), dict)
    for same in (checkpoint, Checkpoint(tmp_path / FOLDER, KEY, every=3)):
        same.load()
        same.pause((0, 3), never)
    checkpoint.pause((1, 0), dict)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [SEAL, "state-1-0.pt"]


def test_sigterm_waits_for_a_pause_and_acts_at_the_end_without_one(tmp_path: Path) -> None:
    checkpoint, before = Checkpoint(tmp_path / FOLDER, KEY), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, checkpoint.heeding_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert (ended.value.code, signal.getsignal(signal.SIGTERM)) == (143, before)
    assert checkpoint.load() is None


@pytest.mark.slow
def test_rog_finetune_that_is_terminated_saves_and_exits_143(tmp_path: Path) -> None:
    more = ("--set", "finetune.updates=400", "--set", "finetune.checkpoint_every=2", "--set", "finetune.evaluations=1")
    few = ("--set", "tasks=[textures]", "--set", "sources=[retrieved]")
    rog = (sys.executable, "-c", "from retrieve_or_generate.cli import main; main()")
    subprocess.run([*rog, "retrieve", "--task", "textures", "--out", tmp_path / "set", *few], check=True)
    command = [*rog, "finetune", "--train", f"{tmp_path}/set", "--scale", "16", "--out", f"{tmp_path}/trial", *more]
    with subprocess.Popen(command) as process:
        while not (tmp_path / "trial" / FOLDER / SEAL).exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 143
    assert {path.name for path in (tmp_path / "trial").iterdir()} == {FOLDER, LOCK}


@pytest.mark.slow
def test_rog_finetune_that_is_killed_while_it_writes_goes_on_with_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each file takes its name, in one folder; the end is that of a call that was left alone."""
    replace, files = Path.replace, []

    def counted(self: Path, target: Path) -> Path:
        if target.is_relative_to(tmp_path / "trial") and target not in files:
            files.append(target)
            (target.parent / ".tmp-left").write_bytes(b"half")
            raise KeyboardInterrupt
        return replace(self, target)

    def rog(out: Path) -> Trial:
        return api.finetune(out, task="textures", save_model=True)

    whole = rog(tmp_path / "whole")
    monkeypatch.setattr(Path, "replace", counted)
    for _ in whole.record["files"]:
        with pytest.raises(KeyboardInterrupt):
            rog(tmp_path / "trial")
    with pytest.raises(KeyboardInterrupt):  # result.json
        rog(tmp_path / "trial")
    with pytest.raises(UsageError, match="not this trial; remove it or choose another --out"):
        api.finetune(tmp_path / "trial", task="digits")
    assert rog(tmp_path / "trial").record["files"] == whole.record["files"]
    assert not list((tmp_path / "trial").rglob(".tmp-*"))
