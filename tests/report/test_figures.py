import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.image_set import REASONS
from retrieve_or_generate.report import figures, make_verdict
from retrieve_or_generate.report.drawing import Drawing, colour_of, styled
from retrieve_or_generate.report.tables import costs

PAIR = ("retrieved", "synthetic")
HOSTILE = "$\\frac{1}{0}$ <b>&\x1b[31m 猫" + "x" * 80


def words_of(drawing: Drawing) -> list[str]:
    """The text in a figure; parsing it shows that it is well-formed."""
    return ["".join(node.itertext()) for node in ET.fromstring(drawing.svg).iter("{http://www.w3.org/2000/svg}text")]


def curation_rows(task: str) -> list[dict[str, object]]:
    dropped = dict.fromkeys(REASONS, 0) | {"clip_score": 30, "nsfw": 2}
    return [{"task": task, "label": source, "candidates": 100, "kept": 68, "reasons": dropped} for source in PAIR]


def test_equal_results_give_equal_bytes_without_a_date(results_of: Callable[..., pd.DataFrame]) -> None:
    def drawn() -> bytes:
        with styled():
            return figures.accuracy_panels(results_of(), ["digits"])["digits", "linear_probe_accuracy"].svg

    first = drawn()
    assert drawn() == first
    assert b"dc:date" not in first
    assert b"Matplotlib v" not in first


def test_a_panel_names_its_axes_scales_and_sources(results_of: Callable[..., pd.DataFrame]) -> None:
    with styled():
        panels = figures.accuracy_panels(results_of(), ["digits"])
    panel = panels["digits", "zero_shot_accuracy"]
    assert panel.name == "accuracy-digits-zero-shot"
    found = words_of(panel)
    assert {"retrieved", "synthetic", "perturbed", "off the shelf", "50", "100", "200", "training images"} <= set(found)
    assert "off the shelf 42.0" in panel.words
    assert panel.svg.count(colour_of("retrieved").encode()) >= 10  # nine points, three deviations, the line


def test_contrasts_show_every_scale_and_who_is_ahead_on_which_side(results_of: Callable[..., pd.DataFrame]) -> None:
    with styled():
        panel = figures.contrast_panels(make_verdict(results_of()), ["digits"])["digits"]
    found = words_of(panel)
    assert found.count("n = 200") == 2  # one a metric
    assert "← synthetic ahead  |  retrieved ahead →" in found
    assert "linear-probe accuracy" in panel.words


def test_names_from_outside_are_shown_as_text(results_of: Callable[..., pd.DataFrame]) -> None:
    results = results_of().replace({"task": {"digits": HOSTILE}, "source": {"perturbed": HOSTILE}})
    with styled():
        drawings = [
            *figures.accuracy_panels(results, [HOSTILE]).values(),
            figures.accuracy_overview(results, [HOSTILE]),
            *figures.curation_panels(curation_rows(HOSTILE), [HOSTILE]).values(),
            figures.cost_panel(costs(results, [])),
        ]
    assert all(words_of(drawing) for drawing in drawings)
    assert all("\x1b" not in drawing.words for drawing in drawings)


def test_one_seed_one_scale_and_no_baseline_can_be_drawn(results_of: Callable[..., pd.DataFrame]) -> None:
    results = results_of(seeds=1, scales=(50,))
    results = results[results["source"] != "none"]
    with styled():
        panels = figures.accuracy_panels(results, ["digits"])
        contrast = figures.contrast_panels(make_verdict(results), ["digits"])
    assert "50" in words_of(panels["digits", "zero_shot_accuracy"])
    assert "n = 50" in words_of(contrast["digits"])


def test_a_long_label_has_room_beside_its_panel(results_of: Callable[..., pd.DataFrame]) -> None:
    def right_end(source: str) -> float:
        """Where the axes end, in points from the left."""
        results = results_of().replace({"source": {"perturbed": source}})
        with styled():
            drawn = figures.accuracy_panels(results, ["digits"])["digits", "zero_shot_accuracy"].svg.decode()
        return max(float(x) for x in re.findall(r"L ([\d.]+) [\d.]+ *\n?\"", drawn))

    assert right_end("mixed-a") == right_end("perturbed")
    assert right_end("mixed-weighed") <= right_end("perturbed") - 12


def test_a_task_without_results_has_no_panel(results_of: Callable[..., pd.DataFrame]) -> None:
    with styled():
        assert figures.accuracy_panels(results_of(), ["cars"]) == {}
        assert figures.contrast_panels(make_verdict(results_of()), ["cars"]) == {}
        assert figures.curation_panels([], ["cars"]) == {}


def test_curation_names_only_the_reasons_that_occurred() -> None:
    with styled():
        found = words_of(figures.curation_panels(curation_rows("digits"), ["digits"])["digits"])
    assert {"kept", "tagged NSFW", "low CLIP score"} <= set(found)
    assert "dead link" not in found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_labels_keep_their_order_and_their_distance(heights: list[float]) -> None:
    placed = figures._apart(heights, 0.1, 0.0, 1.0)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= 0.1 - 1e-9).all()
    assert min(placed) >= -1e-9
    assert max(placed) <= 1 + 1e-9


def test_labels_that_are_far_apart_stay_where_they_are() -> None:
    assert figures._apart([0.2, 0.8, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.2, 0.8, 0.5])
