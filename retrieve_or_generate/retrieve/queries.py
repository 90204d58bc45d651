"""What a pool is asked for: class names in templates and, where that is wanted, training images of each class.

Takes a task and a model; gives the (q, d) features of all its queries, and which of them belong to a class. Features follow from
the task, the model and the kind of device alone: on a CPU one thread computes them, since threads change the last bits of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models import Clip, image_features, text_features
from retrieve_or_generate.precision import one_thread
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.settings import RetrieveSettings
from retrieve_or_generate.tasks.base import Task
from retrieve_or_generate.tasks.templates import filled, templates_for


@dataclass(frozen=True)
class Queries:
    """`texts[i]` says what query i is, `features[i]` is its (d,) float32 unit vector.

    `kinds` are the kinds of query there are, each as (classes, n) places: `kinds[0][c]` are the templates of class c, `kinds[1][c]`
    its example images. A class with fewer examples than are asked for has its first one repeated, and `few_examples` says how many
    there are, by its name.
    """

    texts: tuple[str, ...]
    features: np.ndarray
    kinds: tuple[np.ndarray, ...]
    few_examples: dict[str, int] = field(default_factory=dict)

    @property
    def of_class(self) -> np.ndarray:
        """(classes, n): every query of each class."""
        return np.concatenate(self.kinds, axis=1)

    def told(self, places: np.ndarray) -> str:
        """What a candidate's queries are called."""
        return " + ".join(self.texts[place] for place in places)


def class_queries(task: Task, clip: Clip, settings: RetrieveSettings) -> Queries:
    """The queries of every class, templates first. Raises `UsageError` for a class without a training image to be an example."""
    templates = templates_for(task, settings.templates)
    texts = [filled(template, name) for name in task.class_names for template in templates]
    places = np.arange(len(texts)).reshape(len(task.class_names), len(templates))
    with one_thread():
        features = text_features(clip, texts)
        if not settings.examples_per_class:
            return Queries(tuple(texts), features, (places,))
        keys, pixels, chosen = _examples(task, clip, settings.examples_per_class)
        shown = image_features(clip, pixels)
    there = [len(set(mine)) for mine in chosen.tolist()]
    few = {name: count for name, count in zip(task.class_names, there, strict=True) if count < chosen.shape[1]}
    return Queries((*texts, *keys), np.concatenate([features, shown]), (places, len(texts) + chosen), few)


def _examples(task: Task, clip: Clip, per_class: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, pixels, and the (classes, per_class) places of training images drawn by name, the same whoever draws."""
    split = task.split("train")
    drawn: list[int] = []
    places = np.zeros((len(task.class_names), per_class), np.int64)
    for label, name in enumerate(task.class_names):
        there = np.flatnonzero(split.labels == label)
        if not len(there):
            raise UsageError(
                f"{task.folder}: no training image of class {name!r} to search with; set retrieve.examples_per_class=0"
            )
        order = generator_for("retrieve", "examples", task.name, name).permutation(len(there))[:per_class]
        places[label] = len(drawn)
        places[label, : len(order)] += np.arange(len(order))
        drawn += there[order].tolist()
    pixels = split.decoded(clip.image_size, drawn)
    return [f"training image {split.keys[i]}" for i in drawn], pixels, places
