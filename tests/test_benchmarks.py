"""Benchmarks in their smallest form: that they run to the end, compare outputs, and say what they measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "experiments/benchmarks"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finetune_with_both_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, on a CPU: losses of all arms agree, and every number is there."""
    benchmark = loaded("finetune")
    monkeypatch.setattr(
        sys, "argv", ["", "--tower", "tiny", "--rivals", "paper", "amp", "--repeats", "1", "--images", "37"]
    )
    told = benchmark.compare(benchmark.parsed(), tmp_path)
    assert told["outputs_equal"]
    assert told["losses_apart"]["paper"] == 0
    assert told["losses_apart"]["rog_float32"] < 0.01
    assert 0 < told["ratio_min"] <= told["ratio"] <= told["ratio_max"]
    assert told["ratios"].keys() == told["losses_apart"].keys() - {"rog"} == {"paper", "amp", "rog_float32"}
    assert told["stall"].keys() == {"on_device", "gathered"}
    assert told["of_matrix_product"] > 0
    assert told["size"]["images"] == 32  # full batches


def test_finetune_whose_losses_differ_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = loaded("finetune")
    monkeypatch.setattr(sys, "argv", ["", "--tower", "tiny", "--repeats", "1", "--precision", "float32"])
    boxes = benchmark.drawn_boxes
    monkeypatch.setattr(benchmark, "drawn_boxes", lambda *given: tuple(one * 0.5 for one in boxes(*given)))
    assert not benchmark.compare(benchmark.parsed(), tmp_path)["outputs_equal"]
