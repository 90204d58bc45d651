"""The class name alone, and in templates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy
from retrieve_or_generate.tasks import Task

SourceOf = Callable[..., PromptSource]


@pytest.fixture
def birds(tmp_path: Path) -> Task:
    return Task("birds", ("crane", "auk"), ("{a} {} in flight.", "the {}"), tmp_path)


def test_the_name_alone(birds: Task, source_of: SourceOf) -> None:
    strategy = load_strategy(source_of(task=birds, strategy="class_name"))
    assert [(prompt.text, prompt.origin) for prompt in strategy.prompts(1, 2)] == [("auk", {})] * 2


def test_the_tasks_own_in_turn_with_the_article_that_the_name_asks_for(birds: Task, source_of: SourceOf) -> None:
    strategy = load_strategy(source_of(task=birds, strategy="templates"))
    assert [prompt.text for prompt in strategy.prompts(0, 3)] == [
        "a crane in flight.",
        "the crane",
        "a crane in flight.",
    ]
    assert [prompt.text for prompt in strategy.prompts(1, 1)] == ["an auk in flight."]
    assert strategy.prompts(1, 2)[1].origin == {"template": "the {}"}
    assert strategy.record() == {"templates": 2}


def test_those_of_the_user(birds: Task, source_of: SourceOf) -> None:
    strategy = load_strategy(source_of(task=birds, strategy="templates", templates=["{}!"]))
    assert [prompt.text for prompt in strategy.prompts(0, 2)] == ["crane!", "crane!"]


def test_all_of_clip(birds: Task, source_of: SourceOf) -> None:
    strategy = load_strategy(source_of(task=birds, strategy="templates", templates="imagenet"))
    texts = [prompt.text for prompt in strategy.prompts(0, 81)]
    assert texts[:80] == [template("crane") for template in islice(OPENAI_IMAGENET_TEMPLATES, 80)]
    assert texts[80] == texts[0]


def test_other_templates_are_another_strategy(birds: Task, source_of: SourceOf) -> None:
    source = source_of(task=birds, strategy="templates")
    given = [source.settings.model_copy(update={"templates": one}) for one in (None, ("{}!",), "imagenet")]
    found = {load_strategy(dataclasses.replace(source, settings=settings)).fingerprint for settings in given}
    assert len(found) == 3
