"""A sweep of the linear probe over C: ours against scikit-learn at tol 1e-6, and one fit against AdamW for 200 passes.

    python experiments/benchmarks/probe.py                   # 4,000 × 512 features, 100 classes, 13 values of C: minutes
    python experiments/benchmarks/probe.py --images 900 --width 128 --classes 12 --values 5      # the pocket's size: seconds

Arms alternate in one process; seconds are of CPU, on one thread unless `--threads` says otherwise. AdamW follows the released
code of 2406.05184 (learning rate 1e-2, weight decay 0.1, batches of 256, 200 warm-up updates, then a cosine). One JSON object
comes last: `ratio` is scikit-learn's median over ours, and `outputs_equal` says that for every C our objective is at most
(1 + 1e-4) times theirs, that both choose the same C, and that test accuracy there differs by at most 0.1 points.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from retrieve_or_generate.evaluate.regression import fit_path


@dataclass(frozen=True)
class Split:
    x: np.ndarray
    y: np.ndarray


def features(images: int, width: int, classes: int, seed: int) -> Split:
    """Unit features with class means in a few strong directions and a common one, as CLIP's have. Any seed has the same means."""
    decay = np.arange(1, width + 1) ** -0.7
    means = np.random.default_rng(2406).normal(size=(classes, width)) * 3 * decay**2
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(images) % classes)
    x = means[y] + rng.normal(size=(images, width)) * decay + 2 * np.eye(1, width)
    return Split((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y)


Fit = tuple[np.ndarray, np.ndarray]  # weights (d, k), intercepts (k,)


def ours(train: Split, classes: int, values: list[float]) -> list[Fit]:
    return [(probe.weights, probe.intercepts) for probe in fit_path(train.x, train.y, classes, values)]


def scikit_learn(train: Split, values: list[float]) -> list[Fit]:
    x = train.x.astype(np.float64)
    fits = [LogisticRegression(C=C, tol=1e-6, max_iter=10_000).fit(x, train.y) for C in values]
    return [(fit.coef_.T, fit.intercept_) for fit in fits]


def adamw(train: Split, classes: int, passes: int = 200, batch: int = 256, warmup: int = 200) -> Fit:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    head = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    updates, update = passes * math.ceil(len(x) / batch), 0
    for _ in range(passes):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            cosine = 0.5 + 0.5 * math.cos(math.pi * (update - warmup) / max(1, updates - warmup))
            optimizer.param_groups[0]["lr"] = 1e-2 * ((update + 1) / warmup if update < warmup else cosine)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            update += 1
    return head.weight.detach().numpy().T, head.bias.detach().numpy()


def objective(data: Split, fit: Fit, C: float) -> float:
    logits = data.x.astype(np.float64) @ fit[0] + fit[1]
    top = logits.max(1)
    loss = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(logits)), data.y]
    return float(loss.mean() + (fit[0] ** 2).sum() / (2 * C * len(logits)))


def accuracy(data: Split, fit: Fit) -> float:
    return float(((data.x @ fit[0] + fit[1]).argmax(1) == data.y).mean())


def chosen(fits: list[Fit], val: Split) -> int:
    return int(np.argmax([accuracy(val, fit) for fit in fits]))


def timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds of CPU and of wall clock, and the result."""
    started = time.process_time(), time.perf_counter()
    result = work()
    return (time.process_time() - started[0], time.perf_counter() - started[1]), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("images", 4000),
        ("width", 512),
        ("classes", 100),
        ("values", 13),
        ("repeats", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with threadpool_limits(given.threads):
        print(json.dumps(compare(given)))


def compare(given: argparse.Namespace) -> dict[str, Any]:
    train, val, test = (features(given.images, given.width, given.classes, seed) for seed in range(3))
    values = np.logspace(-2, 4, given.values).tolist()
    arms: dict[str, Callable[[], Any]] = {
        "rog": lambda: ours(train, given.classes, values),
        "scikit_learn": lambda: scikit_learn(train, values),
        "adamw_one_fit": lambda: adamw(train, given.classes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, Any] = {}
    for repeat in range(given.repeats):
        for name, work in arms.items():
            (spent, passed), results[name] = timed(work)
            seconds[name].append(spent)
            wall[name].append(passed)
            print(
                f"{repeat + 1}/{given.repeats} {name}: {spent:.2f} s of CPU, {passed:.2f} s of wall clock", flush=True
            )
    excess = [
        objective(train, a, C) / objective(train, b, C) - 1
        for a, b, C in zip(results["rog"], results["scikit_learn"], values, strict=True)
    ]
    picks = [chosen(results[name], val) for name in ("rog", "scikit_learn")]
    scores = [accuracy(test, results[name][pick]) for name, pick in zip(("rog", "scikit_learn"), picks, strict=True)]
    ratios = [theirs / own for own, theirs in zip(seconds["rog"], seconds["scikit_learn"], strict=True)]
    medians = {name: median(spent) for name, spent in seconds.items()}
    return {
        "name": "probe",
        "ratio": medians["scikit_learn"] / medians["rog"],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": max(excess) <= 1e-4 and picks[0] == picks[1] and abs(scores[0] - scores[1]) <= 1e-3,
        "ratios": {
            "scikit_learn": medians["scikit_learn"] / medians["rog"],
            "adamw_per_fit": medians["adamw_one_fit"] / (medians["rog"] / given.values),
        },
        "seconds": medians,
        "wall_seconds": {name: median(passed) for name, passed in wall.items()},
        "objective_excess_max": max(excess),
        "C": values[picks[0]],
        "test_accuracy": {
            "rog": scores[0],
            "scikit_learn": scores[1],
            "adamw": accuracy(test, results["adamw_one_fit"]),
        },
        "size": {name: getattr(given, name) for name in ("images", "width", "classes", "values", "repeats", "threads")},
    }


if __name__ == "__main__":
    main()
