from __future__ import annotations

import numpy as np
import pytest

from retrieve_or_generate.evaluate.linear_probe import Selection
from retrieve_or_generate.evaluate.probe import Probe
from retrieve_or_generate.finetune.looks import Best, Look

NOTHING = np.zeros((1, 1))


def look(accuracy: float, loss: float, probed: tuple[float, float], update: int = 1) -> Look:
    selection = Selection(Probe(NOTHING, NOTHING[0], 1.0), *probed)
    return Look(1e-3, update, 1.0, accuracy, loss, selection, NOTHING, NOTHING, {})


@pytest.mark.parametrize(
    ("better", "worse"),
    [((0.6, 2.0), (0.5, 1.0)), ((0.5, 1.0), (0.5, 2.0))],
    ids=["more right", "as many right and less loss"],
)
def test_each_use_keeps_its_own_best(better: tuple[float, float], worse: tuple[float, float]) -> None:
    one, other = look(*better, probed=worse), look(*worse, probed=better)
    for offered in ([one, other], [other, one]):
        best = Best()
        for each in offered:
            best.offer(each)
        assert (best.zero_shot is one, best.probed is other) == (True, True)


def test_of_equals_the_earlier_stays() -> None:
    best, first = Best(), look(0.5, 1.0, (0.5, 1.0))
    best.offer(first)
    best.offer(look(0.5, 1.0, (0.5, 1.0), update=2))
    assert best.zero_shot is best.probed is first
