"""A trial by itself: whose folder it writes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrieve_or_generate import api
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import parse_experiment
from retrieve_or_generate.store import locked


def test_two_calls_do_not_write_one_trial(tmp_path: Path) -> None:
    out = tmp_path / "trial"
    with locked(out), pytest.raises(UsageError, match="in use by another run"):
        api.finetune(out, task="digits")
    assert [path.name for path in out.iterdir()] == [".lock"]
    trial = api.finetune(out, task="digits")
    with locked(out):  # what is finished is read, whoever holds it
        assert api.finetune(out, task="digits").record == trial.record


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty, and not this trial"):
        api.finetune(tmp_path, task="digits")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_updates_are_told_of_all_learning_rates(tmp_path: Path) -> None:
    experiment = parse_experiment(
        {"tasks": ["textures"], "sources": ["retrieved"], "finetune": {"updates": 3, "learning_rates": [1e-4, 3e-4]}}
    )
    api.retrieve("textures", tmp_path / "set", experiment)
    told: list[tuple[str, int, int]] = []
    api.finetune(
        tmp_path / "trial",
        tmp_path / "set",
        scale=16,
        experiment=experiment,
        progress=lambda *said: told.append(said),
    )
    assert told == [("updates", done, 6) for done in range(1, 7)]
