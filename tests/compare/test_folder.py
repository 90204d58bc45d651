"""What a run follows from: what prompt strategies are told to read counts by its content, not by its path."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from retrieve_or_generate.compare.folder import check_loss, inputs_key
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.store import content_key
from retrieve_or_generate.tasks import load_task
from retrieve_or_generate.weights import POCKET_WEIGHTS


def _key(**prompts: Any) -> str:
    """Of a run with these prompts, less what the settings themselves say."""
    experiment = Experiment.model_validate({"tasks": ["textures"], "synthesize": {"prompts": prompts}})
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieve_or_generate.compare.folder.without_seeds", lambda experiment: None)
        told.append(inputs_key(experiment, {"textures": load_task("textures")}))
    return content_key(told)


def test_lists_of_hypernyms_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "mine.tsv").write_text("striped\tpattern\n")
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet" / "data.noun").write_text("nouns\n")
    given = {"strategy": "places", "hypernyms": [str(tmp_path / "mine.tsv"), str(tmp_path / "wordnet")]}
    first = _key(**given)
    (tmp_path / "wordnet" / "data.noun").write_text("other nouns\n")
    second = _key(**given)
    (tmp_path / "mine.tsv").write_text("striped\tcloth\n")
    assert len({first, second, _key(**given)}) == 3


def test_models_and_lists_of_the_user_count_by_what_they_hold(tmp_path: Path) -> None:
    shutil.copytree(POCKET_WEIGHTS / "language", tmp_path / "one")
    shutil.copytree(POCKET_WEIGHTS / "language", tmp_path / "two")
    first, second = (_key(strategy="llm", model=str(tmp_path / name)) for name in ("one", "two"))
    assert first == second
    config = tmp_path / "two" / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    assert _key(strategy="llm", model=str(tmp_path / "two")) != first
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "relations.txt").write_text("astride\n")
    with_lists = {"strategy": "llm", "model": str(tmp_path / "one"), "examples": str(tmp_path / "lists")}
    before = _key(**with_lists)
    assert before != first
    (tmp_path / "lists" / "relations.txt").write_text("astride\nbeneath\n")
    assert _key(**with_lists) != before


def test_a_model_that_is_not_used_is_not_looked_for_and_one_that_is_must_be_there() -> None:
    assert _key(strategy="templates", model="no where") == _key(strategy="templates")
    with pytest.raises(UsageError, match="unknown model 'no where'"):
        _key(strategy="image_captions", model="no where")


def test_pocket_weights_are_compared_with_their_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(POCKET_WEIGHTS, tmp_path / "weights")
    (tmp_path / "weights" / "captioner" / "config.json").write_text("{}")
    monkeypatch.setattr("retrieve_or_generate.weights.POCKET_WEIGHTS", tmp_path / "weights")
    _key(strategy="llm")
    with pytest.raises(IntegrityError, match=r"captioner/config\.json"):
        _key(strategy="image_captions")


def test_a_text_tower_that_is_not_there_is_missed_before_anything_is_made() -> None:
    given = {"loss": "contrastive", "model": "timm:resnet50"}
    with pytest.raises(UsageError, match=r"trains a text tower, and timm:resnet50 has none: cross_entropy$"):
        check_loss(Experiment.model_validate({"finetune": given}))
    check_loss(Experiment.model_validate({"finetune": given | {"loss": "cross_entropy"}}))
    check_loss(Experiment.model_validate({"finetune": {"loss": "contrastive"}}))
