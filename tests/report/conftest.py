"""A run folder like `rog compare` leaves it, with made-up numbers and real pictures of the pocket world."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieve_or_generate.experiment import dump_experiment, load_experiment
from retrieve_or_generate.image_set import CANDIDATES, ImageSetWriter, read_table, seal_image_set
from retrieve_or_generate.pixels import decode, encode_jpeg
from retrieve_or_generate.pocket.captions import VOCABULARIES
from retrieve_or_generate.pocket.pictures import evaluation_split
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.store import write_bytes, write_json

SHELF = {"digits": (0.42, 0.61), "textures": (0.55, 0.70), "aircraft": (0.35, 0.52)}  # zero-shot, linear probe
GAIN = {"retrieved": 0.050, "synthetic": 0.032, "perturbed": 0.041}  # per doubling of the images
STRENGTHS = (0.2, 0.4, 0.6, 0.8)


def fake_results(seeds: int = 3, scales: tuple[int, ...] = (50, 100, 200), spread: float = 0.012) -> pd.DataFrame:
    """Long rows with the contract's columns: three tasks, the off-the-shelf model and three sources."""
    rows: list[dict[str, Any]] = []
    cells = [("none", 0), *itertools.product(GAIN, scales)]
    for task, (source, scale), seed in itertools.product(SHELF, cells, range(seeds)):
        rng = generator_for("fake", "score", task, source, scale, seed)
        doublings = np.log2(scale / 25) if scale else 0.0
        trial = f"{task}-{source}-n{scale}-s{seed}-0123456789abcdef"
        for metric, base in zip(("zero_shot_accuracy", "linear_probe_accuracy"), SHELF[task], strict=True):
            share = 1.0 if metric.startswith("zero") else 0.5
            task_share = {"digits": 1.0, "textures": 0.6, "aircraft": 0.8}[task]
            noise = rng.normal(0, spread) if scale else 0.0
            value = base + share * task_share * GAIN.get(source, 0) * doublings + noise
            row = {"task": task, "source": source, "scale": scale, "seed": seed, "metric": metric}
            row |= {"value": round(value * 600) / 600, "split": "test", "n_train": scale, "n_test": 600}
            rows.append(row | {"wall_seconds": 4.0 if scale else 1.1, "device": "cpu", "trial": trial})
    return pd.DataFrame(rows)


def _made(image: np.ndarray, strength: float, rng: np.random.Generator) -> bytes:
    """Something like a generated picture: low frequencies of noise mixed in."""
    noise = np.kron(rng.uniform(0, 255, (4, 4, 3)), np.ones((8, 8, 1)))
    return encode_jpeg(((1 - 0.6 * strength) * image + 0.6 * strength * noise).astype(np.uint8))


def _curated(table: pa.Table, reasons: dict[str, float], rng: np.random.Generator) -> pa.Table:
    """Drop shares of the candidates for `reasons`, rank the others at random within their class."""
    rows = table.to_pandas()
    still = rows["reason"] == ""
    drawn = rng.choice(["", *reasons], len(rows), p=[1 - sum(reasons.values()), *reasons.values()])
    rows["reason"] = rows["reason"].where(~still, drawn)
    rows["status"] = np.where(rows["reason"] == "", "kept", "dropped")
    rows["clip_score"] = rng.uniform(0.1, 0.4, len(rows)).astype(np.float32)
    shuffled = rows[rows["status"] == "kept"].sample(frac=1, random_state=int(rng.integers(1 << 30)))
    rows["rank"] = shuffled.groupby("label").cumcount().reindex(rows.index).fillna(-1).astype(int)
    return pa.Table.from_pandas(rows, preserve_index=False)


def fake_set(
    folder: Path,
    task: str,
    source: str,
    per_class: int = 10,
    strength: float = float("nan"),
    class_names: tuple[str, ...] = (),
    caption: str = "{}",
    first: int | None = None,
) -> None:
    """A finished image set of `task`; pictures are the same for every source, changed as much as `strength` says."""
    rng = generator_for("fake", "set", task, source, str(strength))
    names = class_names or VOCABULARIES[task].class_names
    pictures = evaluation_split(task, "train")
    with ImageSetWriter(
        folder, task=task, source=source, key="k", class_names=names, config={"first": first}
    ) as writer:
        for label, name in enumerate(names):
            mine = [picture.jpeg for picture in pictures if picture.label == label][: first or per_class]
            for index, jpeg in enumerate(mine):
                retrieved = f"{task}-{label}-{index}"
                origin = {"pool": "pocket", "row": index, "url": "http://127.0.0.1/"}
                image = jpeg
                if source != "retrieved":
                    origin = {"generator": "pocket", "prompt": name, "seed": index}
                    image = _made(decode(jpeg), 1.0 if np.isnan(strength) else strength, rng)
                if not np.isnan(strength):
                    origin["init_key"] = retrieved
                writer.add(
                    key=retrieved if source == "retrieved" else f"generated-{label}-{index}",
                    label=label,
                    caption=caption.replace("{}", name),
                    origin=origin,
                    query=name,
                    image=image,
                    strength=strength,
                    reason="dead_link" if source == "retrieved" and index % 9 == 2 else "",
                )
        writer.finish()
    reasons = {"contaminated": 0.05, "duplicate": 0.1, "clip_score": 0.25}
    shares = reasons if source == "retrieved" else {"clip_score": 0.25}
    seal_image_set(folder, _curated(read_table(folder / CANDIDATES), shares, rng))


def _stages(per_class: int) -> list[dict[str, Any]]:
    seconds = {"retrieved": 2.4, "synthetic": 31.0, "perturbed": 17.5}
    rows: list[dict[str, Any]] = [
        {"stage": "prepare", "task": None, "source": None, "wall_seconds": 9.1, "images": 20000, "device": "cpu"}
    ]
    for task, source in itertools.product(SHELF, seconds):
        for stage, share in (("retrieve" if source == "retrieved" else "synthesize", 1.0), ("curate", 0.1)):
            images = per_class * len(VOCABULARIES[task].class_names)
            row = {"stage": stage, "task": task, "source": source, "wall_seconds": seconds[source] * share}
            rows.append(row | {"images": images, "device": "cpu", "peak_memory_gib": 0.9 + share / 3})
    return rows


def fake_run(
    folder: Path,
    results: pd.DataFrame | None = None,
    per_class: int = 10,
    strengths: tuple[float, ...] = STRENGTHS,
    pool: str = "pocket",
) -> Path:
    """A whole run folder. `results` replaces the made-up numbers."""
    results = fake_results() if results is None else results
    seeds = int(results["seed"].max()) + 1
    experiment = load_experiment(seeds=seeds, pool=pool, scales=[50, 100, 200]).model_copy(
        update={} if pool == "pocket" else {"model": "ViT-B-16/laion2b", "generator": "sd"}
    )
    write_bytes(folder / "experiment.yaml", dump_experiment(experiment).encode())
    environment = {"python": "3.11.2", "packages": {"torch": "2.14.1", "numpy": "2.4.6"}, "device": "cpu", "threads": 1}
    write_json(folder / "environment.json", environment)
    write_json(folder / "stages.json", _stages(per_class))
    write_results(folder, results)
    for task in SHELF:
        fake_set(folder / "sets" / task / "retrieved", task, "retrieved", per_class)
        fake_set(folder / "sets" / task / "synthetic", task, "synthetic", per_class)
        for strength in strengths:
            first = None if strength == 0.4 else 1
            fake_set(
                folder / "sets" / task / ("perturbed" if first is None else f"shown-{strength}"),
                task,
                "perturbed",
                per_class,
                strength,
                first=first,
            )
    return folder


def write_results(folder: Path, results: pd.DataFrame) -> None:
    """`results.parquet` and the trials that it names."""
    for trial in set(results["trial"]):
        path = folder / "trials" / trial / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"trial": trial}))
    pq.write_table(pa.Table.from_pandas(results, preserve_index=False), folder / "results.parquet")


@pytest.fixture(scope="session")
def _finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("run"), per_class=3, strengths=(0.2, 0.4, 0.8))


@pytest.fixture
def run_folder(_finished_run: Path, tmp_path: Path) -> Path:
    """A copy of one small run, to write to and to damage."""
    return Path(shutil.copytree(_finished_run, tmp_path / "run"))


@pytest.fixture
def results_of() -> Callable[..., pd.DataFrame]:
    """`results_of(seeds=3, scales=(50, 100, 200), spread=0.012)`: made-up results."""
    return fake_results


@pytest.fixture
def rewrite() -> Callable[[Path, pd.DataFrame], None]:
    """`rewrite(folder, results)`: other results into a run folder."""
    return write_results


@pytest.fixture
def make_set() -> Callable[..., None]:
    """`make_set(folder, task, source, …)`: a finished image set."""
    return fake_set
