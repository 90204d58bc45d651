"""Accuracy under shift: the table's numbers by hand, the figure's words, and that nothing else of a report moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retrieve_or_generate.report import shifts, write_report
from retrieve_or_generate.report.drawing import styled

ACCURACY = "zero_shot_accuracy"


def _rows(source: str, scale: int, own: list[float], under: list[float], split: str = "dusk") -> list[dict[str, Any]]:
    cell = {"task": "birds", "source": source, "scale": scale, "metric": ACCURACY, "n_train": scale, "n_test": 10}
    rest = {"wall_seconds": 1.0, "device": "cpu"}
    return [
        cell | rest | {"seed": seed, "trial": f"{source}{scale}{seed}", "split": name, "value": value}
        for name, values in (("test", own), (split, under))
        for seed, value in enumerate(values)
    ]


def _results() -> pd.DataFrame:
    rows = _rows("none", 0, [0.5], [0.3]) + _rows("retrieved", 8, [0.7, 0.8], [0.4, 0.3])
    return pd.DataFrame(rows + _rows("synthetic", 8, [0.6, 0.6], [0.5, 0.5]))


def test_drop_and_gains_by_hand() -> None:
    records = shifts.records(shifts.shifted_cells(_results(), ["birds"]))
    assert [row["source"] for row in records] == ["retrieved", "synthetic", "none"]
    told = records[0]
    assert (told["n"], told["among_some"], told["values"]) == (2, False, [0.4, 0.3])
    numbers = {name: told[name] for name in ("own", "shifted", "sd", "drop", "own_gain", "shifted_gain")}
    expected = {"own": 0.75, "shifted": 0.35, "sd": 0.1 / 2**0.5, "drop": 0.4, "own_gain": 0.25, "shifted_gain": 0.05}
    assert numbers == pytest.approx(expected)
    assert (records[2]["sd"], records[2]["own_gain"], records[2]["drop"]) == (None, None, pytest.approx(0.2))


def test_where_some_classes_are_shown_own_images_are_those_of_these() -> None:
    among = pd.DataFrame(_rows("none", 0, [], [0.9], "test/dusk"))
    cells = shifts.shifted_cells(pd.concat([_results(), among]), ["birds"])
    shelf = next(cell for cell in cells if cell.source == "none")
    assert (shelf.own.tolist(), shelf.shifted.tolist(), shelf.among_some) == ([0.9], [0.3], True)
    assert {cell.shift for cell in cells} == {"dusk"}


def test_the_panel_says_its_numbers_and_bears_one_seed_and_no_shelf() -> None:
    with styled():
        panels = shifts.shift_panels(shifts.shifted_cells(_results(), ["birds"]))
        alone = pd.DataFrame(_rows("mixed-half", 8, [0.6], [0.5]))
        assert shifts.shift_panels(shifts.shifted_cells(alone, ["birds"]))
    drawing = panels["birds", "dusk", ACCURACY]
    assert "retrieved n=8 75.0 and 35.0" in drawing.words
    assert all(f">{label}<" in drawing.svg.decode() for label in ("retrieved", "synthetic", "off the shelf"))


def test_a_report_shows_shifts_and_its_verdict_does_not_change(
    run_folder: Path,
    results_of: Callable[..., pd.DataFrame],
    rewrite: Callable[[Path, pd.DataFrame], None],
) -> None:
    rewrite(run_folder, results_of())
    before = write_report(run_folder).read_text()
    plain = json.loads((run_folder / "verdict.json").read_text())
    digits = results_of().query("task == 'digits'")
    rewrite(run_folder, pd.concat([results_of(), digits.assign(split="<dusk>", value=digits["value"] / 2)]))
    page = write_report(run_folder).read_text()
    verdict = json.loads((run_folder / "verdict.json").read_text())
    assert plain.pop("shifts") == []
    assert len(verdict.pop("shifts")) == 2 * 10
    assert verdict == plain
    assert ('id="shift"' in page, 'id="shift"' in before) == (True, False)
    assert "&lt;dusk&gt;" in page
    assert "<dusk>" not in page
    assert len(list((run_folder / "figures").glob("shift-digits-dusk-*.svg"))) == 2
    assert ("dusk&gt; *" in page, "among these, on images of these" in page) == (False, False)
    shifted = [digits.assign(split=split, value=digits["value"] / 2) for split in ("<dusk>", "test/<dusk>")]
    rewrite(run_folder, pd.concat([results_of(), *shifted]))
    page = write_report(run_folder).read_text()
    assert page.count("dusk&gt; *") == 2 * 10
    assert "among these, on images of these" in page
