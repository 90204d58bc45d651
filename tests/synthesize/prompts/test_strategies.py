"""What holds for every prompt strategy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.synthesize.prompts import STRATEGIES, PromptSource, Strategy, load_strategy
from retrieve_or_generate.tasks import Task

SourceOf = Callable[..., PromptSource]


@pytest.fixture(params=STRATEGIES)
def load(request: pytest.FixtureRequest, source_of: SourceOf, tmp_path: Path) -> Callable[[], Strategy]:
    """Loads a strategy anew for the pocket textures, from a folder without a single split, so none of them looks at one."""
    source = source_of(strategy=request.param, file=str(tmp_path / "prompts.tsv"))
    lines = [f"{name}\ta {name} {thing}" for name in source.task.class_names for thing in ("rug", "wall")]
    (tmp_path / "prompts.tsv").write_text("\n".join(lines))
    return lambda: load_strategy(source)


def test_a_split_that_is_looked_at_is_an_error(splitless: Task) -> None:
    with pytest.raises(UsageError, match=r"split|shards"):
        splitless.split("test")


def test_asking_for_more_changes_nothing_and_the_class_is_named(load: Callable[[], Strategy]) -> None:
    few, many = load().prompts(3, 4), load().prompts(3, 9)
    assert (len(few), len(many)) == (4, 9)
    assert many[:4] == few
    assert all("zigzagged" in prompt.text for prompt in many)


def test_another_order_of_asking_changes_nothing(load: Callable[[], Strategy]) -> None:
    one, other = load(), load()
    asked = [one.prompts(0, 3), one.prompts(2, 5), one.prompts(2, 7)]
    assert [other.prompts(2, 7), other.prompts(0, 3)] == [asked[2], asked[0]]
    assert one.record() == other.record()
    assert one.fingerprint == other.fingerprint


def test_none_asked_for_is_none(load: Callable[[], Strategy]) -> None:
    assert load().prompts(1, 0) == []


def test_what_is_recorded_is_json_and_prompts_are_one_line_each(load: Callable[[], Strategy]) -> None:
    strategy = load()
    prompts = strategy.prompts(5, 6)
    json.dumps([strategy.record(), *(dict(prompt.origin) for prompt in prompts)], allow_nan=False)
    assert isinstance(strategy.uses_real_captions, bool)
    assert all(prompt.text == " ".join(prompt.text.split()) != "" for prompt in prompts)
