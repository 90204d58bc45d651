"""What holds for every prompt strategy."""

from __future__ import annotations

import pytest

from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.synthesize.prompts import STRATEGIES, PromptSource, load_strategy
from retrieve_or_generate.tasks import Task


@pytest.mark.parametrize("name", STRATEGIES)
def test_asking_for_more_changes_nothing_and_the_class_is_named(name: str, task: Task, retrieved: ImageSet) -> None:
    strategy = load_strategy(PromptSource(task, retrieved, PromptSettings.model_validate({"strategy": name})))
    few, many = strategy.prompts(3, 4), strategy.prompts(3, 9)
    assert (len(few), len(many)) == (4, 9)
    assert many[:4] == few
    if not strategy.uses_real_captions:
        assert all(task.class_names[3] in prompt.text for prompt in many)
