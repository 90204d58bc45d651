"""The verbs that do work: the whole comparison, and each stage alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieve_or_generate.cli.options import (
    AsJson,
    Data,
    Device,
    ExperimentFile,
    IndexFolder,
    Out,
    Overrides,
    Pool,
    Quick,
    Task,
    emit,
    emit_set,
    read_experiment,
)


def compare(
    experiment: ExperimentFile = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="trials per cell; default: the experiment's", show_default=False),
    ] = None,
    data: Data = None,
    overrides: Overrides = None,
    quick: Quick = False,
    out: Out = None,
    index_folder: IndexFolder = None,
    device: Device = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="worker processes; default: one a core, if memory bears so many",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole comparison and end with the verdict.

    Tasks × sources × scales × seeds, whatever of it is missing in the folder; then results.parquet, verdict.json and
    report.html.

    \b
    Examples:
      rog compare --seeds 3
      rog compare laion.yaml --device cuda --out runs/laion
      rog compare experiments/mixing.yaml --out runs/mixing
      rog compare --set tasks=[digits] --set scales=[50] --seeds 1 --out runs/quick
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine
    from retrieve_or_generate.report import verdict_text

    asked = read_experiment(experiment, overrides, quick, seeds=seeds)
    folder = out or Path("runs") / asked.name
    verdict = api.compare(folder, asked, device, jobs, ProgressLine(), index_folder)
    text = f"{verdict_text(verdict)}\n\nreport: {folder / 'report.html'}"
    emit(text, {"out": folder, "report": folder / "report.html", "verdict": verdict}, as_json)


def retrieve(
    experiment: ExperimentFile = None,
    task: Task = None,
    pool: Pool = None,
    data: Data = None,
    overrides: Overrides = None,
    quick: Quick = False,
    out: Out = None,
    index_folder: IndexFolder = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Search a pool for a task's classes.

    Class names in templates against the pool's embeddings or captions, then the curation that every source goes through.
    Writes an image set; a call that was stopped is gone on with by the same call. Without --task, the experiment's first task.

    \b
    Examples:
      rog retrieve --task digits --out sets/digits
      rog retrieve experiments/unmet_promise/flowers.yaml --task my-flowers/ --pool /data/laion2b --out sets/flowers
      rog retrieve --task digits --set retrieve.engine=index --index-folder indexes/pocket --out sets/by-index
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine

    asked = read_experiment(experiment, overrides, quick, pool=pool)
    wanted = task or asked.tasks[0]
    folder = out or Path("runs") / f"{Path(wanted).name}-retrieved"
    emit_set(api.retrieve(wanted, folder, asked, device, ProgressLine(), index_folder), as_json)


def finetune(
    experiment: ExperimentFile = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SET",
            help="image set, or given twice the two to mix; left out: the model off the shelf",
            show_default=False,
        ),
    ] = None,
    task: Task = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="images to train on, of two sets half from each; default: all", show_default=False
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="mix in the loss: batches of equal halves, G of the first set's loss and 1 - G of the second's",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="which of the paired repetitions")] = 0,
    save_model: Annotated[
        bool, typer.Option("--save-model", help="keep model and head in OUT/model, for plain open_clip or timm")
    ] = False,
    data: Data = None,
    overrides: Overrides = None,
    quick: Quick = False,
    out: Out = None,
    device: Device = "cpu",
    processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="that share the work, with --device cuda on a GPU each")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Adapt the model to an image set and measure it.

    Writes a trial: accuracy on the task's test images, and on its shifted test sets, as zero-shot classifier and by linear probe,
    and every prediction. --task is needed only where it is a folder, or without --train. What was stopped is gone on with by the
    same call, with any number of processes; torchrun starts them, too.

    \b
    Examples:
      rog finetune --train sets/digits --scale 100 --seed 0 --out trials/digits-100
      rog finetune --task digits --out trials/digits-off-the-shelf
      rog finetune --train sets/digits --train sets/generated --scale 100 --out trials/digits-mixed
      rog finetune laion.yaml --train sets/birds --device cuda --processes 8 --out trials/birds
      torchrun --nproc-per-node 8 -m retrieve_or_generate finetune laion.yaml --train sets/birds --device cuda
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.finetune.processes import place
    from retrieve_or_generate.progress import ProgressLine

    asked = read_experiment(experiment, overrides, quick)
    folder = out or Path("runs") / f"{_called(train, task)}-n{scale or 'all' if train else 0}-s{seed}"
    trial = api.finetune(folder, train, task, scale, seed, asked, device, save_model, gamma, processes, ProgressLine())
    if place()[0]:
        return  # the first process says it
    lines = [f"{name:<40} {value:.4f}" for name, value in _in_order(trial.metrics)]
    seen = "{n_train} images, {updates} updates, {wall_seconds:.1f} s on {device}; {n_test} test images".format(
        **trial.record
    )
    for shift, told in trial.shifts.items():
        lines.append(f"{shift}: {told['n_test']} images of {told['classes']} classes, scores among these")
        lines += [f"  {name:<38} {value:.4f}" for name, value in _in_order(told["metrics"])]
    found = {"out": folder, "metrics": trial.metrics, "shifts": trial.shifts}
    emit("\n".join([f"{folder}: {seen}", *lines]), found, as_json)


def _in_order(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """Zero-shot first, whether the trial was made just now or read back."""
    return sorted(metrics.items(), key=lambda one: (one[0].startswith("linear_probe"), one[0]))


def _called(train: list[Path] | None, task: str | None) -> str:
    return "-".join(path.name for path in train) if train else Path(task or "").name
