"""`rog synthesize`: images generated for a task's classes, or retrieved ones perturbed, by one process or by many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from retrieve_or_generate.cli.options import (
    AsJson,
    Data,
    ExperimentFile,
    Out,
    Overrides,
    Quick,
    Task,
    emit,
    emit_set,
    read_experiment,
)
from retrieve_or_generate.errors import UsageError


def synthesize(
    experiment: ExperimentFile = None,
    like: Annotated[
        Path | None, typer.Option(metavar="SET", help="image set whose class counts to match", show_default=False)
    ] = None,
    init: Annotated[Path | None, typer.Option(metavar="SET", help="image set to perturb", show_default=False)] = None,
    strength: Annotated[
        str | None,
        typer.Option(metavar="S[,S…]", help="how far to perturb, each from 0 to 1; with --init", show_default=False),
    ] = None,
    task: Task = None,
    data: Data = None,
    overrides: Overrides = None,
    quick: Quick = False,
    out: Out = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:N, or several: cuda:0,cuda:1")] = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="processes on the CPU; default: one a core", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, metavar="R", help="which of --world processes this is", show_default=False)
    ] = None,
    world: Annotated[
        int | None, typer.Option(min=1, metavar="W", help="processes that fill one folder", show_default=False)
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="rank and world from SLURM_PROCID and SLURM_NTASKS")] = False,
    as_json: AsJson = False,
) -> None:
    """Generate images for a task's classes.

    As many of each class as the set given with --like has; or the images of the set given with --init, perturbed by
    --strength (one image set each: FOLDER-0.2, FOLDER-0.4). --task is needed only where it is a folder. A call that was
    stopped is gone on with by the same call.

    Several processes, on one machine or on many with a shared disk, fill one folder when each is told its --rank: the one
    that finds everything there finishes the set, the others end when their share is made.

    \b
    Examples:
      rog synthesize --like sets/digits --out sets/digits-synthetic
      rog synthesize --init sets/digits --strength 0.2,0.4 --out sets/digits-perturbed
      rog synthesize laion.yaml --like sets/birds --out sets/birds-made --device cuda:0,cuda:1
      srun --ntasks 8 rog synthesize laion.yaml --like sets/birds --out sets/birds-made --device cuda --slurm
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine
    from retrieve_or_generate.synthesize import OtherRanksError

    asked, (mine, ranks) = read_experiment(experiment, overrides, quick), _place(rank, world, slurm)
    strengths = _strengths(strength)
    base = out or Path("runs") / f"{(like or init or Path()).name}-{'synthetic' if like else 'perturbed'}"
    for amount in strengths:
        folder = base if len(strengths) == 1 else base.with_name(f"{base.name}-{amount:g}")
        try:
            made = api.synthesize(folder, like, init, amount, task, asked, device, ProgressLine(), jobs, mine, ranks)
        except OtherRanksError as others:
            emit(str(others), {"out": folder, "finished": False}, as_json)
        else:
            emit_set(made, as_json)


def _strengths(text: str | None) -> list[float | None]:
    try:
        return [float(part) for part in text.split(",")] if text else [None]
    except ValueError as error:
        raise UsageError(f"--strength {text!r}: numbers from 0 to 1 with commas between, such as 0.2,0.4") from error


def _place(rank: int | None, world: int | None, slurm: bool) -> tuple[int, int | None]:
    """Rank and world; a world of None where this process works alone."""
    if (rank is None) != (world is None) or (slurm and rank is not None):
        raise UsageError("give --rank and --world together, or --slurm alone")
    if not slurm:
        return rank or 0, world
    try:
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    except (KeyError, ValueError) as error:
        raise UsageError(
            "--slurm: no SLURM_PROCID and SLURM_NTASKS here; start with srun, or give --rank and --world (of a job array: "
            "--rank $SLURM_ARRAY_TASK_ID --world $SLURM_ARRAY_TASK_COUNT)"
        ) from error
