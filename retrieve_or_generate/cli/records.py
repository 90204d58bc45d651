"""The verbs that look: at a run, at recorded checksums, at what has a name, at this environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieve_or_generate.cli.options import AsJson, Data, emit
from retrieve_or_generate.endings import DamageFoundError
from retrieve_or_generate.errors import IntegrityError, UsageError


def report(
    run: Annotated[Path, typer.Argument(help="folder that rog compare wrote")],
    as_json: AsJson = False,
) -> None:
    """Write the report of a run anew.

    From what its trials stored: verdict.json, results.csv, figures/ and report.html. Nothing is measured again.

    \b
    Example:  rog report runs/pocket
    """
    from retrieve_or_generate.report import write_report

    page = write_report(run)
    emit(str(page), {"report": page}, as_json)


def status(
    run: Annotated[Path, typer.Argument(help="folder that rog compare writes")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Say what is finished of a run, and what is left.

    \b
    Example:  rog status runs/pocket
    """
    from retrieve_or_generate import api

    found = api.status(run)
    lines = [f"{run}: experiment {found['experiment']}"]
    lines += ["  {:<11} {} of {}".format(what, *found[what]) for what in ("sets", "trials")]
    lines.append(f"  {'report':<11} {'written' if found['report'] else 'not yet; rog compare goes on with the run'}")
    emit("\n".join(lines), {"out": run, **found}, as_json)


def verify(
    path: Annotated[Path, typer.Argument(help="a pool, index, image set, trial or run, or a folder of them")],
    as_json: AsJson = False,
) -> None:
    """Compare finished files with their checksums.

    Every file of every finished pool, index, image set, trial and run below PATH. The first that differs is named, exit code 4.
    Where PATH is a pool, published or made here, every row of it is looked at: row counts, dimension, finite, unit length, ids.

    \b
    Example:  rog verify runs/pocket
    """
    from dataclasses import asdict

    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine

    try:
        units, files = api.verify(path)
        pool = api.verify_pool(path, ProgressLine())
    except IntegrityError as error:
        raise DamageFoundError(str(error)) from error
    text = f"{path}: {files} files in {units} finished units are as recorded"
    if pool is None:
        emit(text, {"units": units, "files": files}, as_json)
        return
    lines = [text] if units else []
    lines.append(
        f"{path}: {pool.rows} rows of dimension {pool.dim} in {pool.shards} shards fit together, each finite and of length 1"
    )
    if pool.foreign_ids:
        lines.append(
            f"ids (hash) of {pool.foreign_ids} rows are not those of their URL and caption: list rows by the pool's own ids"
        )
    if pool.missing:
        lines.append(f"not there, so rows are counted without them: {', '.join(pool.missing)}")
    emit("\n".join(lines), {"units": units, "files": files, "pool": asdict(pool)}, as_json)


def tasks(
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help="name, folder or task.yaml to check", show_default=False)
    ] = None,
    data: Data = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="images of each split that are read; default: all", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that have a name, or check one.

    Those of the pocket world are always there; published ones are read from files of yours below --data. A task is also a folder in
    CLIP_benchmark's webdataset layout, or one with a task.yaml (docs/tasks.md). Checking TASK reads and decodes its images, counts
    them by split, shift and class, and names those that cannot be read; exit code 2 where there are any.

    \b
    Examples:
      rog tasks --data /data
      rog tasks dtd --data /data
      rog tasks my-birds/
    """
    if task is None:
        from retrieve_or_generate.tasks.listing import list_tasks

        rows = list_tasks()
        emit("\n".join(_task_lines(rows)), {"tasks": rows}, as_json)
        return
    from retrieve_or_generate.progress import ProgressLine
    from retrieve_or_generate.tasks import load_task
    from retrieve_or_generate.tasks.check import check_task

    found = check_task(load_task(task), sample, ProgressLine())
    emit("\n".join(found.lines()), found.record(), as_json)
    if not found.is_whole:
        raise typer.Exit(UsageError.exit_code)


def _task_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'task':<16} {'classes':>7} {'train':>8} {'val':>6} {'test':>6}  files"]
    for row in rows:
        shifts = f", shifts: {', '.join(row['shifts'])}" if row["shifts"] else ""
        lines.append("{task:<16} {classes:>7} {train:>8} {val:>6} {test:>6}  {files}".format(**row) + shifts)
    return lines


def models(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="name, folder or file to load and describe", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that have a name, or describe one.

    The pocket one, and those that open_clip and timm (timm:NAME) download. A model is also a folder that one of them can load,
    hf-hub:ORG/REPO, or a file of weights, ARCH/FILE#SHA256. Describing MODEL loads it: size, normalisation, features, checksum.

    \b
    Examples:
      rog models | grep ViT-B-16
      rog models trials/digits-100/model
    """
    from retrieve_or_generate.models.listing import describe, model_names

    if model is None:
        names = model_names()
        emit("\n".join(names), {"models": names}, as_json)
        return
    found = describe(model)
    emit("\n".join(f"{name:<17} {value}" for name, value in found.items()), found, as_json)


def doctor(as_json: AsJson = False) -> None:
    """Look at whether this environment can do the work.

    Versions, faiss, torch, devices, memory and disk. Exit code 2 where something will fail, with what to do about it.

    \b
    Example:  rog doctor
    """
    from dataclasses import asdict

    from retrieve_or_generate.doctor import as_text, examine
    from retrieve_or_generate.store import cache_folder

    checks = examine(cache_folder())
    emit(as_text(checks), {"checks": [asdict(check) for check in checks]}, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(UsageError.exit_code)
