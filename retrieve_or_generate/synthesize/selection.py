"""Adaptive selection after Sehwag: of more synthetic images than are needed, those that real images are thin around or that a
discriminator takes for real, and always beside them as many drawn at random.

Each rule gives every image one number and keeps the best of its class, as many as the retrieved set has. Real are the images of
that set, never the task's own. Distances are between CLIP embeddings of unit length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieve_or_generate.curate.described import Described
from retrieve_or_generate.curate.features import kept_features
from retrieve_or_generate.curate.score import places
from retrieve_or_generate.curate.steps import Decision, Seen, Step
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import SelectionSettings

_VERSION = 1  # part of what identifies a set: raise when the same images are chosen otherwise
_FOLDS = 5
_MOST = 20_000  # real and as many synthetic images that a discriminator learns from: far more than it has weights
_INVERSE_REGULARISATION = 0.1  # of LogisticRegression on standardised features: tells apart best on the pocket world
_BLOCK = 2048  # rows whose distances are held at once
_ROUNDING = 1e-12  # of squared distances in float64


@dataclass(frozen=True)
class Embedded:
    """Images of one origin: `features` (n, d) float32 of unit length, their `labels` and `keys`, (n,)."""

    keys: np.ndarray
    labels: np.ndarray
    features: np.ndarray

    def of(self, label: int) -> np.ndarray:
        return self.features[self.labels == label]


@dataclass(frozen=True)
class Judged:
    """What a rule says of each image: `score` (n,) float64, the highest are kept; `measured`, by name, is told of in the record."""

    score: np.ndarray
    measured: dict[str, np.ndarray]
    told: dict[str, float]


def left_over(wanted: np.ndarray, settings: SelectionSettings) -> np.ndarray:
    """How many images of each class, (classes,) int64, the filter is to leave so that `wanted` of them can be chosen."""
    return wanted if settings.rule == "all" else np.ceil(np.round(wanted * settings.over, 9)).astype(np.int64)


def selection_step(settings: SelectionSettings, task: str, like: ImageSet) -> Step | None:
    """The rule as a step of curation: as many of each class as `like` has; None where all images stay."""
    if settings.rule == "all":
        return None

    def decide(left: Described, seen: Seen) -> Decision:
        kept = like.kept
        real = Embedded(kept["key"].to_numpy(str), kept["label"].to_numpy(), kept_features(like, seen.clip, seen.cache))
        made = Embedded(left.keys, left.labels, left.features)
        chosen, told = select(made, real, like.counts(), settings, task)
        return ~chosen, told

    of = like.record["files"]["manifest.parquet"]["sha256"]
    follows_from = {"version": _VERSION, "of": of, **settings.model_dump(mode="json")}
    return Step("selection", "scored", "not_selected", follows_from, decide)


Rule = Callable[[Embedded, Embedded, int, str], Judged]
"""Synthetic and real images, the number of neighbours, and the task's name."""


def select(
    made: Embedded, real: Embedded, quotas: np.ndarray, settings: SelectionSettings, task: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which images of `made` stay, (n,) bool, `quotas[c]` of class c or all where there are fewer; and what is to be recorded.

    The record gives the rule's own measures as means over all images, those chosen, and as many chosen at random. The order of rows
    changes nothing. Raises `UsageError` for too few images to tell real from synthetic.
    """
    order = np.argsort(made.keys, kind="stable")
    made = Embedded(made.keys[order], made.labels[order], made.features[order])
    judged = _RULES[settings.rule](made, real, settings.neighbours, task)
    best, at_random = (_best(score, made, quotas) for score in (judged.score, _drawn(made, task)))
    over = {"all": np.ones(len(best), bool), "chosen": best, "random": at_random}
    measured = {
        name: {which: _mean(values[rows]) for which, rows in over.items()} for name, values in judged.measured.items()
    }
    counts = {which: int(rows.sum()) for which, rows in over.items()}
    chosen = np.empty(len(best), bool)
    chosen[order] = best
    return chosen, {"rule": settings.rule, "images": counts, "measured": measured, **judged.told}


def _mean(values: np.ndarray) -> float | None:
    """To six digits, which outlast another order of adding."""
    return float(f"{values.mean():.6g}") if len(values) else None


def _best(score: np.ndarray, made: Embedded, quotas: np.ndarray) -> np.ndarray:
    return np.asarray(places(score, made.labels, made.keys) < quotas[made.labels])


def _drawn(made: Embedded, task: str) -> np.ndarray:
    """(n,) float64 in [0, 1): of an image's key alone."""
    return np.array([seed_for("selection", "random", task, str(key)) for key in made.keys]) / 2.0**63


def _random(made: Embedded, real: Embedded, neighbours: int, task: str) -> Judged:
    return Judged(_drawn(made, task), {}, {})


def _low_density(made: Embedded, real: Embedded, neighbours: int, task: str) -> Judged:
    """Far from the nearest real images of the class, but inside a ball that a real image and its neighbours span (improved
    precision, 1904.06991). What lies outside all balls comes after everything inside, the nearest first.
    """
    distance, outside = np.zeros(len(made.keys)), np.zeros(len(made.keys))
    for label in np.unique(made.labels).tolist():
        rows = np.flatnonzero(made.labels == label)
        distance[rows], outside[rows] = density(made.features[rows], real.of(label), neighbours)
    on = outside <= 1
    # Inside: the distance, at most 2. Outside: below every one of them, the less the farther.
    score = np.where(on, distance, -outside)
    return Judged(score, {"distance": distance, "on_manifold": on.astype(float)}, {"neighbours": neighbours})


def density(made: np.ndarray, real: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """For (n, d) synthetic and (m, d) real images of one class: the mean distance to the nearest real images, and how far outside
    the nearest ball an image lies, as a multiple of its radius (1 and less: inside); (n,) float64 each.

    The ball of a real image reaches to its k-th neighbour among the others. A class with a single real image has no balls, and all
    lies inside; fewer real images than neighbours are all the neighbours there are.
    """
    if not len(real):
        return np.zeros(len(made)), np.zeros(len(made))
    radii = np.full(len(real), np.inf)
    if len(real) > 1:  # the first of the sorted distances is that of the image from itself
        among = min(neighbours, len(real) - 1)
        radii = np.concatenate([np.partition(block, among, axis=1)[:, among] for block in _distances(real, real)])
    near = min(neighbours, len(real))
    distance, outside = [np.empty(0)], [np.empty(0)]
    for block in _distances(made, real):
        distance.append(np.partition(block, near - 1, axis=1)[:, :near].mean(1))
        outside.append(_in_radii(block, radii).min(1))
    return np.concatenate(distance), np.concatenate(outside)


def _in_radii(distances: np.ndarray, radii: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(distances / radii, nan=0.0, posinf=np.inf)  # 0/0: on a real image that has a copy


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """(n, d) and (m, d) to (rows, m) float64, a block of rows after the other; equal vectors have distance 0."""
    b = b.astype(np.float64)
    squares = np.square(b).sum(1)
    for start in range(0, len(a), _BLOCK):
        block = a[start : start + _BLOCK].astype(np.float64)
        squared = np.square(block).sum(1)[:, None] + squares - 2 * block @ b.T
        yield np.sqrt(np.where(squared < _ROUNDING, 0, squared))


def _hardest(made: Embedded, real: Embedded, neighbours: int, task: str) -> Judged:
    """Taken for real by a discriminator that has not seen the image.

    It is linear on embeddings, so moving every point by the same length changes all margins alike: the order is the same at every
    radius of an attack, and no attack is needed (Sehwag's score is a robust discriminator's).
    """
    for_real, of_made = cross_fitted(real, made, task)
    return Judged(of_made, {"log_odds_real": of_made}, {"auc": float(f"{_auc(for_real, of_made):.6g}")})


def cross_fitted(real: Embedded, made: Embedded, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of being real, (m,) and (n,) float64, each by a discriminator that was fitted to the other folds.

    One discriminator for all classes, on features from which the mean of the class's real images is taken; both origins weigh
    alike. Folds follow from the keys.
    """
    if min(len(real.keys), len(made.keys)) < 2 * _FOLDS:
        raise UsageError(
            f"synthesize.selection.rule=hardest: {len(real.keys)} real and {len(made.keys)} synthetic images are too few to tell "
            f"apart; it needs {2 * _FOLDS} of each, or another rule"
        )
    sides = {"real": real, "made": made}
    folds = {name: _folds(side, name, task) for name, side in sides.items()}
    odds = {name: np.empty(len(side.keys)) for name, side in sides.items()}
    for fold in range(_FOLDS):
        centres = _centres(real, folds["real"] != fold)
        learn = [_centred(side, folds[name] != fold, centres, task, _MOST) for name, side in sides.items()]
        log_odds = _discriminator(*learn)
        for name, side in sides.items():
            odds[name][folds[name] == fold] = log_odds(_centred(side, folds[name] == fold, centres, task))
    return odds["real"], odds["made"]


def _folds(side: Embedded, name: str, task: str) -> np.ndarray:
    """(n,) int64: of each class a fifth in each fold, give or take one."""
    draws = np.array([seed_for("selection", "fold", task, name, str(key)) for key in side.keys])
    folds = np.empty(len(side.keys), np.int64)
    folds[np.lexsort((side.keys, draws, side.labels))] = np.arange(len(side.keys)) % _FOLDS
    return folds


def _centres(real: Embedded, rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Labels to the mean of their real images among `rows`; of all of them for a class that has none there."""
    features, labels = real.features[rows].astype(np.float64), real.labels[rows]
    known = np.unique(labels)
    means = np.stack([features.mean(0), *(features[labels == label].mean(0) for label in known)])
    place = {label: row for row, label in enumerate(known.tolist(), start=1)}
    return lambda wanted: means[[place.get(label, 0) for label in wanted.tolist()]]


def _centred(
    side: Embedded, rows: np.ndarray, centres: Callable[[np.ndarray], np.ndarray], task: str, most: int | None = None
) -> np.ndarray:
    chosen = np.flatnonzero(rows)
    if most is not None and len(chosen) > most:
        draws = [seed_for("selection", "learn", task, str(key)) for key in side.keys[chosen]]
        chosen = chosen[np.argsort(draws, kind="stable")[:most]]
    return side.features[chosen] - centres(side.labels[chosen])


def _discriminator(real: np.ndarray, made: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """(n, d) features to the log-odds of being real, (n,)."""
    from sklearn.linear_model import LogisticRegression

    features = np.concatenate([real, made])
    mean, deviation = features.mean(0), features.std(0) + 1e-12
    is_real = np.repeat([1, 0], [len(real), len(made)])
    fitted = LogisticRegression(C=_INVERSE_REGULARISATION, class_weight="balanced", max_iter=1000)
    fitted.fit((features - mean) / deviation, is_real)
    return lambda rows: np.asarray(fitted.decision_function((rows - mean) / deviation))


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(truth, np.concatenate([positive, negative])))


_RULES: dict[str, Rule] = {"random": _random, "low_density": _low_density, "hardest": _hardest}
