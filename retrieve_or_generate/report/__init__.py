"""Rows in; verdict, tables, figures and one HTML page out. Needs no GPU library.

Reads a run folder (`report/run.py` says what) and writes `verdict.json`, `results.csv`, `figures/*.svg` and, last, `report.html`
into it. A pure function of what the folder holds: called twice, it writes the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrieve_or_generate.report.run import Run, open_run
from retrieve_or_generate.report.verdict import make_verdict, verdict_text
from retrieve_or_generate.store import write_bytes, write_json

__all__ = ["make_verdict", "verdict_text", "write_report"]


def _verdict(run: Run) -> dict[str, Any]:
    return make_verdict(
        run.results,
        experiment=run.experiment.name,
        tasks=run.tasks,
        primary=run.experiment.primary,
        pocket=run.pocket,
        missing=run.missing(),
    )


def write_report(run_folder: Path) -> Path:
    """Write the report of a run and return the path of its page.

    Raises `UsageError` when the folder is no run, `IntegrityError` when something in it is missing or was changed.
    """
    # matplotlib is for those who draw: a repeated comparison reads its verdict alone
    from retrieve_or_generate.report import figures, page, shifts, side_by_side, tables
    from retrieve_or_generate.report.drawing import styled

    run = open_run(run_folder)
    verdict, curation = _verdict(run), tables.curation(run.whole_sets)
    costs, shifted = tables.costs(run.results, run.stages), shifts.shifted_cells(run.results, run.tasks)
    verdict["shifts"] = shifts.records(shifted)
    with styled(run.results["source"]):
        drawn = page.Figures(
            contrasts=figures.contrast_panels(verdict, run.tasks),
            accuracy=figures.accuracy_panels(run.results, run.tasks),
            sources=side_by_side.sources_panels(run.results, run.tasks),
            shifts=shifts.shift_panels(shifted),
            strength=side_by_side.strength_panels(run.results, run.tasks),
            overview=figures.accuracy_overview(run.results, run.tasks),
            curation=figures.curation_panels(curation, run.tasks),
            cost=figures.cost_panel(costs),
        )
    html = page.render(run, verdict, drawn, curation, costs)
    write_json(run_folder / "verdict.json", verdict)
    write_bytes(run_folder / "results.csv", tables.results_csv(run.results))
    for drawing in drawn.all():
        write_bytes(run_folder / "figures" / f"{drawing.name}.svg", drawing.svg)
    write_bytes(run_folder / "report.html", html)
    return run_folder / "report.html"
