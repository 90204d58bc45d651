from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.finetune import TaskImages, TrialOutcome, finetune, metrics_of, read_trial, write_trial
from retrieve_or_generate.finetune.trial import MODEL, RESULT, begin_trial, is_begun
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import FinetuneSettings, ProbeSettings

CONFIG = {"task": "colours", "source": "none", "scale": 0, "seed": 0}


@pytest.fixture(scope="module")
def outcome(clip: Clip, task: TaskImages) -> TrialOutcome:
    return finetune(clip, None, task, FinetuneSettings(), ProbeSettings(), seed=1)


def test_what_was_written_is_read_back(tmp_path: Path, outcome: TrialOutcome) -> None:
    written = write_trial(tmp_path, CONFIG, outcome)
    read = read_trial(tmp_path, CONFIG)
    assert read == written
    assert read is not None
    assert read.metrics == outcome.metrics
    assert tuple(read.history) == outcome.history
    assert (read.record["n_test"], read.record["n_train"], read.record["device"]) == (21, 0, "cpu")
    assert read.predictions["key"].to_pylist() == list(outcome.test.keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "predictions.parquet",
        RESULT,
    ]


def test_every_number_can_be_computed_again_from_the_predictions(tmp_path: Path, outcome: TrialOutcome) -> None:
    table = write_trial(tmp_path, CONFIG, outcome).predictions
    labels = table["label"].to_numpy()
    logits, p = (
        table[name].combine_chunks().flatten().to_numpy().reshape(len(labels), -1)
        for name in ("zero_shot_logits", "linear_probe_probabilities")
    )
    assert metrics_of(labels, logits, p) == outcome.metrics
    assert (table["zero_shot"].to_numpy() == logits.argmax(1)).all()
    assert np.mean(table["linear_probe"].to_numpy() == labels) == outcome.linear_probe_accuracy


def test_equal_outcomes_give_equal_files(tmp_path: Path, outcome: TrialOutcome) -> None:
    for name in ("a", "b"):
        write_trial(tmp_path / name, CONFIG, outcome)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_trial_that_was_killed_while_it_was_written_is_known_again(tmp_path: Path, outcome: TrialOutcome) -> None:
    assert not is_begun(tmp_path, CONFIG)
    begin_trial(tmp_path, CONFIG)
    (tmp_path / MODEL).mkdir()
    for left in (tmp_path / MODEL / "head.safetensors", tmp_path / ".tmp-half"):
        left.write_bytes(b"half")
    assert is_begun(tmp_path, CONFIG)
    assert not is_begun(tmp_path, CONFIG | {"seed": 1})
    begin_trial(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    write_trial(tmp_path, CONFIG, outcome)
    assert not is_begun(tmp_path, CONFIG)


def test_only_a_finished_trial_of_the_same_configuration_counts(tmp_path: Path, outcome: TrialOutcome) -> None:
    assert read_trial(tmp_path / "nothing") is None
    write_trial(tmp_path, CONFIG, outcome)
    assert read_trial(tmp_path, CONFIG | {"seed": 1}) is None
    assert read_trial(tmp_path) is not None
    (tmp_path / RESULT).unlink()  # as after a kill
    assert read_trial(tmp_path, CONFIG) is None


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "predictions.parquet"])
def test_a_changed_byte_is_found_and_named(tmp_path: Path, outcome: TrialOutcome, name: str) -> None:
    write_trial(tmp_path, CONFIG, outcome)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        read_trial(tmp_path, CONFIG)


def test_a_model_that_is_kept_belongs_to_the_trial(tmp_path: Path, outcome: TrialOutcome) -> None:
    assert write_trial(tmp_path / "without", CONFIG, outcome).model is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model/head.json").write_text("{}")
    trial = write_trial(tmp_path, CONFIG, outcome, model=[tmp_path / "model/head.json"])
    assert trial.model == tmp_path / "model"
    (tmp_path / "model/head.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"model/head.json: its bytes changed"):
        read_trial(tmp_path, CONFIG)
