"""The run folder: what it must hold to be gone on with, and where things lie in it.

Reads and writes `experiment.yaml` (resolved), `environment.json` and `run.json`, the seal of a finished run. Loads no model.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retrieve_or_generate import __version__
from retrieve_or_generate.curate.descriptor import find_descriptor
from retrieve_or_generate.doctor import installed
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.executors import core_count
from retrieve_or_generate.experiment import Experiment, dump_experiment, load_experiment
from retrieve_or_generate.in_context import read_lists
from retrieve_or_generate.pool.layout import open_pool
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.store import content_key, read_json, read_seal, seal, sha256_of, write_bytes, write_json
from retrieve_or_generate.tasks import Task, load_task
from retrieve_or_generate.text_models import Part, find_text_model
from retrieve_or_generate.weights import check_pocket_weights, clip_fingerprint, find_model, generator_fingerprint

EXPERIMENT, ENVIRONMENT, SEAL = "experiment.yaml", "environment.json", "run.json"
_PACKAGES = (
    "torch",
    "open_clip_torch",
    "diffusers",
    "transformers",
    "faiss-gpu",
    "faiss-cpu",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
)
MEASURED = ("results.parquet", "stages.json", EXPERIMENT, ENVIRONMENT)
DERIVED = ("results.csv", "verdict.json", "report.html")  # `rog report` may write these anew, so they are not sealed


def check_loss(experiment: Experiment) -> None:
    """`UsageError` before anything is made where a text tower is to be trained and there is none."""
    model = experiment.finetuned_model
    if experiment.finetune.loss == "contrastive" and find_model(model).library == "timm":
        raise UsageError(f"finetune.loss=contrastive trains a text tower, and {model} has none: cross_entropy")


def check_folder(out: Path, experiment: Experiment, inputs: str) -> None:
    """`UsageError` unless `out` is free, or holds this experiment on these inputs; the number of seeds may differ.

    `inputs` is `inputs_key`.
    """
    path = out / EXPERIMENT
    if not path.is_file():
        others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")] if out.is_dir() else []
        if others:
            raise UsageError(f"{out}: not empty and not a run ({others[0]} is there); choose another --out")
        return
    before = without_seeds(load_experiment(path))
    changed = [name for name, value in without_seeds(experiment).items() if before[name] != value]
    if changed:
        raise UsageError(f"{out}: holds another experiment ({', '.join(changed)} differ); choose another --out")
    if read_json(out / ENVIRONMENT)["inputs"] != inputs:
        raise UsageError(f"{out}: begun with another pool, model, task or version of rog; choose another --out")


def without_seeds(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json", exclude={"seeds"})


def write_head(out: Path, experiment: Experiment, device: str, inputs: str, tasks: Iterable[str]) -> None:
    """What the run is, before anything is run; the experiment last, as it marks the folder as a run.

    `tasks` are their names, which an experiment that gives them as files and folders does not say.
    """
    write_json(out / ENVIRONMENT, environment(device) | {"inputs": inputs, "tasks": list(tasks)})
    write_bytes(out / EXPERIMENT, dump_experiment(experiment).encode())


def environment(device: str) -> dict[str, Any]:
    """Where a run was made: enough to explain a difference, nothing that names a user or a path."""
    packages = {name: installed(name) for name in _PACKAGES}
    return {
        "rog": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cores": core_count(),
        "packages": packages,
    }


def inputs_key(experiment: Experiment, tasks: dict[str, Task]) -> str:
    """What a run follows from, its seeds aside: the experiment, what its names stand for, and the version of rog."""
    generators = sorted({experiment.variant(source).generator for source in experiment.sources})
    for part, used in (("clip", [experiment.model]), ("stable-diffusion", generators)):
        if "pocket" in used:
            check_pocket_weights(part)
    return content_key(
        {
            "version": __version__,
            "experiment": without_seeds(experiment),
            "tasks": [[task.fingerprint, task.shift_fingerprints] for task in tasks.values()],
            "pool": _pool_fingerprint(experiment),
            "model": clip_fingerprint(experiment.model),
            "finetuned": clip_fingerprint(experiment.finetuned_model),
            "generators": [generator_fingerprint(name) for name in generators],
            "prompts": [_rests_on(experiment.variant(source).synthesize.prompts) for source in experiment.sources],
            "descriptor": find_descriptor(experiment.curate).record,
        }
    )


def _rests_on(prompts: PromptSettings) -> list[Any]:
    """What the files, folders and the model hold that a prompt strategy is told of."""
    named = [prompts.places, *(prompts.hypernyms or ()), prompts.file]
    told: list[Any] = [[sha256_of(path) for path in _files(Path(name))] for name in named if name is not None]
    if prompts.strategy in ("image_captions", "llm"):
        part: Part = "captioner" if prompts.strategy == "image_captions" else "language"
        if prompts.model == "pocket":
            check_pocket_weights(part)
        told.append(find_text_model(prompts.model, part).fingerprint)
    if prompts.strategy == "llm":
        told.append(read_lists(Path(prompts.examples) if prompts.examples is not None else None).fingerprint)
    return told


def _files(path: Path) -> list[Path]:
    """A file; of a folder the nouns of WordNet, which are what is read of it."""
    return [path] if path.is_file() else sorted(path.glob("*.noun"))


def _pool_fingerprint(experiment: Experiment) -> str | None:
    """None where a service searches a pool of its own."""
    return None if experiment.retrieve.engine == "remote" else open_pool(experiment.pool).fingerprint


def load_tasks(experiment: Experiment) -> dict[str, Task]:
    """The experiment's tasks by name; `UsageError` when two folders have one name."""
    tasks = [load_task(name) for name in experiment.tasks]
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise UsageError(f"tasks {', '.join(experiment.tasks)}: two of them are called the same; rename one folder")
    return by_name


def is_finished(out: Path, key: str) -> bool:
    """Whether the run with this key is done, every measured file of it as it was written, and its report there."""
    return read_seal(out, SEAL, key) is not None and all((out / name).is_file() for name in DERIVED)


def seal_run(out: Path, key: str, trials: list[str]) -> None:
    """Write `run.json` last: everything the report is made of, with checksums."""
    files = [out / name for name in MEASURED]
    files += [path for trial in trials for path in sorted((out / "trials" / trial).iterdir()) if path.is_file()]
    files += [path for path in sorted((out / "sets").rglob("*")) if path.is_file() and not path.name.startswith(".")]
    seal(out, SEAL, key, files, trials=trials)
