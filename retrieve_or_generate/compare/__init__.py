"""The whole comparison: plans the grid, runs what is missing, collects rows, and hands them to the report.

Reads an experiment; writes a run folder (docs/design.md has its layout). Image sets are made once and shared by all trials; a
worker decodes each once. A run that was stopped, however, is gone on with by the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from retrieve_or_generate.compare import sets, trials
from retrieve_or_generate.compare.folder import (
    check_folder,
    check_loss,
    inputs_key,
    is_finished,
    load_tasks,
    seal_run,
    write_head,
)
from retrieve_or_generate.compare.plan import check_scales, plan_trials
from retrieve_or_generate.compare.results import write_results, write_stages
from retrieve_or_generate.compare.workers import fitting_jobs
from retrieve_or_generate.executors import Unit, core_count, run_units
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.pocket.places import POOL, is_pool_there, is_task_there, world_builder
from retrieve_or_generate.report import write_report
from retrieve_or_generate.store import content_key, locked, read_json, remove_leftovers
from retrieve_or_generate.tasks import Task, load_task, task_names
from retrieve_or_generate.weights import clip_fingerprint

__all__ = ["compare"]

Progress = Callable[[str, int, int], None]


def compare(
    experiment: Experiment,
    out: Path,
    device: str = "cpu",
    jobs: int | None = None,
    progress: Progress | None = None,
    index_folder: Path | None = None,
) -> dict[str, Any]:
    """Run the experiment into folder `out` and give the verdict (what `verdict.json` holds).

    `jobs` worker processes of one thread each, by default one a core, or as many as memory bears. `index_folder` is where a FAISS
    index lies or is built, beside the pool by default. `progress` is called with what is being done, how many of it are done, and
    how many there are.

    Raises:
        UsageError: `out` holds something else, an input is not there, a source selects without its random counterpart, or memory
            is too small for `jobs`.
        IntegrityError: a file changed since it was written.
    """
    experiment.check_selection()
    check_loss(experiment)
    progress = progress or _silent
    asked, jobs = jobs, jobs or core_count()
    _build_world(experiment, jobs, progress)
    tasks = load_tasks(experiment)
    inputs = inputs_key(experiment, tasks)
    check_folder(out, experiment, inputs)
    key = content_key([inputs, experiment.seeds])
    if not is_finished(out, key):
        with locked(out):
            remove_leftovers(out)
            write_head(out, experiment, device, inputs, tasks)
            jobs = fitting_jobs(experiment, tasks, device, asked)
            _run(_Run(experiment, tasks, out, device, jobs, progress, index_folder), key)
    return dict(read_json(out / "verdict.json"))


def _build_world(experiment: Experiment, jobs: int, progress: Progress) -> None:
    """Build what the experiment needs of the pocket world and is not there, in workers, whose memory is free again afterwards."""
    for name in experiment.tasks:
        if name not in task_names():
            load_task(name)  # a mistake is told before anything is built
    units = [Unit(name, name) for name in experiment.tasks if name in task_names() and not is_task_there(name)]
    if experiment.pool == "pocket" and experiment.retrieve.engine != "remote" and not is_pool_there():
        units.append(Unit(POOL, POOL, cost=2))
    if units:
        progress("building the pocket world", 0, len(units))
    for done, _ in enumerate(run_units(units, world_builder, jobs), start=1):
        progress("building the pocket world", done, len(units))


def _silent(what: str, done: int, total: int) -> None:
    """Progress for nobody."""


@dataclass(frozen=True)
class _Run:
    experiment: Experiment
    tasks: dict[str, Task]
    out: Path
    device: str
    jobs: int
    progress: Progress
    index_folder: Path | None

    def search(self) -> None:
        """Search the pool once for all tasks, in a worker of all threads, whose memory is free again afterwards."""
        units = sets.search_units(self.out, self.tasks, self.experiment)
        load = partial(sets.prepare_search, self.out, self.experiment, self.device, self.jobs, self.index_folder)
        for _ in run_units(units, load, self.jobs, apart=True, progress=self.progress):
            pass

    def work(self, what: str, units: list[Unit[Any]], prepare: Callable[..., Any]) -> None:
        """Do the units in workers that start with `prepare`."""
        load = partial(prepare, self.out, self.experiment, self.device)
        if units:
            self.progress(what, 0, len(units))
        for done, _ in enumerate(run_units(units, load, self.jobs, progress=self.progress), start=1):
            self.progress(what, done, len(units))


def _run(run: _Run, key: str) -> None:
    """Everything that is missing of the run, in turn: search, image sets, trials, results, report, and the seal."""
    run.search()
    for what, units in sets.missing(run.out, run.tasks, run.experiment):
        run.work(what, units, partial(sets.prepare, index_folder=run.index_folder))
        check_scales(run.experiment, run.tasks, sets.retrieved_sets(run.out, run.tasks))
    drawn = sets.open_sets(run.out, run.tasks, run.experiment)
    grid = plan_trials(run.experiment, run.tasks, drawn, clip_fingerprint(run.experiment.finetuned_model))
    run.work("trials", [Unit(t.name, t, cost=t.scale) for t in grid if not trials.is_done(run.out, t)], trials.prepare)
    write_results(run.out, grid)
    write_stages(run.out)
    write_report(run.out)
    seal_run(run.out, key, [trial.name for trial in grid])
