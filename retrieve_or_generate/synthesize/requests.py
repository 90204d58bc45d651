"""Which images are asked for: how many of each class, from which prompts and seeds, and how many more when some are lost.

The filter keeps a share f of each class, of every source. So that it leaves K images of a class, floor(K / f) of them must come to
it that are fit: not flagged by the generator's safety checker, no copy of an evaluation image, of each other, or of what else is
not wanted. As many are asked for at first; then, round by round, as many more as are missing, never more than that: a class from
which the filter could choose among more would be chosen more strictly. An image that is flagged is drawn again from other noise
before it counts as lost. Rounds and tries are bounded; a class that is not filled by then is an error.

Seeds follow from the names of task and class, and an image's number in its class, so a round, a process or a device changes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.synthesize.prompts import HoldsModel, Strategy
from retrieve_or_generate.synthesize.prompts.text import clean
from retrieve_or_generate.tasks.base import Task
from retrieve_or_generate.tasks.templates import filled

ROUNDS = 10
"""Times that what is missing is asked for, after the first."""

TRIES = 5
"""Images drawn for one request, where the safety checker flags them."""


@dataclass(frozen=True)
class Request:
    """One image to make, from a prompt or, with `init_key`, from an image. `origin` is what the prompt was made from."""

    key: str
    label: int
    prompt: str
    seed: int
    origin: Mapping[str, Any] = field(default_factory=dict)
    init_key: str | None = None

    def seed_at(self, attempt: int) -> int:
        """Of its noise when it is drawn for the first time (0), and again."""
        return self.seed if attempt == 0 else seed_for("synthesize", "redraw", self.seed, attempt)


def fit_needed(kept: np.ndarray, keep_fraction: float | None) -> np.ndarray:
    """Images of each class, (classes,) int64, of which a filter that rounds up keeps `kept`."""
    return np.array([math.floor(round(count / (keep_fraction or 1), 9)) for count in kept.tolist()], np.int64)


def round_requests(number: int, task: Task, strategy: Strategy, asked: np.ndarray, more: np.ndarray) -> list[Request]:
    """The next `more[c]` images of each class c, of which `asked[c]` were asked for in earlier rounds.

    A round's keys follow on those before it, so that what was computed of earlier images holds.
    """
    requests = []
    for label, (before, count) in enumerate(zip(asked.tolist(), more.tolist(), strict=True)):
        if not count:
            continue
        name = task.class_names[label]
        for i, prompt in enumerate(strategy.prompts(label, before + count)[before:], start=before):
            seed = seed_for("synthesize", "noise", task.name, name, i)
            key = f"{number:02d}-{label:04d}-{i:06d}"
            requests.append(Request(key, label, prompt.text, seed, prompt.origin))
    if isinstance(strategy, HoldsModel):
        strategy.rest()
    return requests


OWN_CAPTION = "caption"
"""The prompt that stands for the image's own."""


def perturb_requests(task: Task, rows: pd.DataFrame, prompt: str | None) -> list[Request]:
    """One for each of the `rows` of a manifest, under the same key.

    `prompt` has {} where the class name goes; None is the task's first template, `caption` the image's own caption, or that
    template where it has none.
    """
    template = task.templates[0] if prompt in (None, OWN_CAPTION) else str(prompt)
    requests = []
    for row in rows.itertuples():
        caption = clean(row.caption or "") if prompt == OWN_CAPTION else ""
        text = caption or filled(template, task.class_names[row.label])
        seed = seed_for("perturb", "noise", task.name, row.key)
        requests.append(Request(row.key, row.label, text, seed, init_key=row.key))
    return requests


def missing(fit: np.ndarray, needed: np.ndarray, reaching: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many more of each class to ask for, (classes,) int64.

    Of `fit` images `needed` are to come to the filter; of those `reaching` the least score allowed, `wanted` are to be left.
    """
    return np.maximum(np.maximum(needed - fit, wanted - reaching), 0)


def told_of(requests: Sequence[Request]) -> list[list[Any]]:
    """What a unit's key is made of, as JSON."""
    return [[r.key, r.label, r.prompt, r.seed, dict(r.origin), r.init_key] for r in requests]
