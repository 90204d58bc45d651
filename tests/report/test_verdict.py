import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.report import make_verdict, verdict_text

Results = Callable[..., pd.DataFrame]


def rows(
    task: str, source: str, scale: int, values: Sequence[float], metric: str = "linear_probe_accuracy"
) -> pd.DataFrame:
    """One cell of a results table, a row a seed."""
    common = {"task": task, "source": source, "scale": scale, "metric": metric, "split": "test", "n_train": scale}
    common |= {"n_test": 600, "wall_seconds": 1.0, "device": "cpu"}
    return pd.DataFrame(
        [common | {"seed": s, "value": v, "trial": f"{task}-{source}-n{scale}-s{s}"} for s, v in enumerate(values)]
    )


def two_sources(retrieved: Sequence[float], synthetic: Sequence[float], task: str = "digits") -> pd.DataFrame:
    return pd.concat(
        [rows(task, "retrieved", 800, retrieved), rows(task, "synthetic", 800, synthetic)], ignore_index=True
    )


def headline(results: pd.DataFrame) -> dict[str, Any]:
    return make_verdict(results)["headlines"][0]


def test_a_clear_difference_is_claimed_in_these_words() -> None:
    """d = 4.0, 4.1, 4.2: mean 4.1, half-width 4.3027 · 0.1 / √3 = 0.248."""
    said = headline(two_sources([0.640, 0.651, 0.662], [0.600, 0.610, 0.620]))
    assert said["status"] == "difference"
    assert said["winner"] == "retrieved"
    assert said["sentence"] == (
        "retrieved beats synthetic on digits by 4.1 points of linear-probe accuracy at n = 800, "
        "95 % interval [3.9, 4.3], three seeds."
    )


def test_the_winner_comes_first_and_its_lead_is_positive() -> None:
    said = headline(two_sources([0.600, 0.610, 0.620], [0.640, 0.651, 0.662]))
    assert said["winner"] == "synthetic"
    assert said["sentence"].startswith("synthetic beats retrieved on digits by 4.1 points")
    assert "[3.9, 4.3]" in said["sentence"]


def test_an_interval_that_holds_zero_shows_no_difference_and_never_says_equal() -> None:
    said = headline(two_sources([0.64, 0.60, 0.65], [0.60, 0.61, 0.62]))
    assert said["status"] == "no_difference_shown"
    assert said["winner"] is None
    assert said["sentence"] == (
        "no difference shown between retrieved and synthetic on digits: 2.0 points of linear-probe accuracy at n = 800 "
        "in favour of retrieved, 95 % interval [-4.6, 8.6], three seeds."
    )
    assert "equal" not in json.dumps(make_verdict(two_sources([0.6, 0.7], [0.7, 0.6])))


def test_the_same_data_as_both_sources_differ_by_exactly_zero() -> None:
    verdict = make_verdict(two_sources([0.64, 0.60, 0.65], [0.64, 0.60, 0.65]))
    assert (verdict["contrasts"][0]["mean"], verdict["contrasts"][0]["low"], verdict["contrasts"][0]["high"]) == (
        0,
        0,
        0,
    )
    assert (
        "no difference shown between retrieved and synthetic on digits: 0.0 points"
        in verdict["headlines"][0]["sentence"]
    )
    assert "in favour" not in verdict["headlines"][0]["sentence"]


def test_one_seed_carries_no_claim() -> None:
    verdict = make_verdict(two_sources([0.64], [0.60]))
    assert verdict["headlines"][0]["sentence"] == (
        "no claim on digits: one seed has no interval (retrieved - synthetic = 4.0 points of linear-probe accuracy at n = 800)."
    )
    assert verdict["caveats"] == ["One seed carries no claim: run with --seeds 3 or more."]
    assert verdict["contrasts"][0]["low"] is None


def test_seeds_that_all_differ_by_the_same_carry_no_claim() -> None:
    said = headline(two_sources([0.64, 0.65, 0.66], [0.60, 0.61, 0.62]))
    assert said["status"] == "no_claim"
    assert "three seeds gave the same difference" in said["sentence"]


def test_holm_turns_a_lone_hint_among_tasks_into_no_claim() -> None:
    """p = 0.026 on its own; times three it is no longer below 0.05."""
    hint = two_sources([0.640, 0.640, 0.655], [0.600, 0.615, 0.610])
    assert headline(hint)["status"] == "difference"
    others = [two_sources([0.64, 0.60, 0.65], [0.60, 0.61, 0.62], task) for task in ("textures", "aircraft")]
    said = make_verdict(pd.concat([hint, *others]), tasks=["digits", "textures", "aircraft"])["headlines"][0]
    assert said["status"] == "lead"
    assert said["winner"] is None
    assert said["sentence"].endswith("after Holm's correction over 3 tasks: no claim.")


def test_a_task_without_p_value_still_counts_in_the_family() -> None:
    clear = two_sources([0.640, 0.651, 0.662], [0.600, 0.610, 0.620])
    constant = two_sources([0.64, 0.65, 0.66], [0.60, 0.61, 0.62], "textures")
    first = make_verdict(pd.concat([clear, constant]))["contrasts"][0]
    assert first["p_holm"] == pytest.approx(2 * first["p_t"])
    assert make_verdict(pd.concat([clear, constant]))["contrasts"][1]["p_holm"] is None


def test_only_the_primary_contrast_may_claim(results_of: Results) -> None:
    verdict = make_verdict(results_of())
    primary = [contrast for contrast in verdict["contrasts"] if contrast["primary"]]
    assert [(c["a"], c["b"], c["metric"], c["scale"]) for c in primary] == [
        ("retrieved", "synthetic", "linear_probe_accuracy", 200)
    ] * 3
    assert all(contrast["winner"] is None for contrast in verdict["contrasts"] if not contrast["primary"])
    assert any(contrast["sentence"].endswith("exploratory: no claim.") for contrast in verdict["contrasts"])


def test_every_pair_of_sources_is_contrasted_at_every_scale(results_of: Results) -> None:
    verdict = make_verdict(results_of())
    pairs = itertools.combinations(("retrieved", "synthetic", "perturbed", "none"), 2)
    expected = set(itertools.product(("digits", "textures", "aircraft"), (50, 100, 200), pairs))
    found = [(c["task"], c["scale"], (c["a"], c["b"])) for c in verdict["contrasts"]]
    assert set(found) == expected
    assert len(found) == 2 * len(expected)  # two metrics


def test_the_order_of_rows_does_not_matter(results_of: Results) -> None:
    results = results_of()
    assert make_verdict(results.sample(frac=1, random_state=1)) == make_verdict(results)


def test_another_source_changes_no_contrast_of_the_others(results_of: Results) -> None:
    results = results_of()
    without = make_verdict(results[results["source"] != "perturbed"])
    with_it = [c for c in make_verdict(results)["contrasts"] if "perturbed" not in (c["a"], c["b"])]
    assert with_it == without["contrasts"]


def test_renaming_the_sources_mirrors_the_verdict(results_of: Results) -> None:
    results = results_of()
    swapped = results.assign(source=results["source"].replace({"retrieved": "synthetic", "synthetic": "retrieved"}))
    for one, other in zip(make_verdict(results)["headlines"], make_verdict(swapped)["headlines"], strict=True):
        names = {"retrieved": "synthetic", "synthetic": "retrieved", None: None}
        assert other["winner"] == names[one["winner"]]
        assert other["status"] == one["status"]


def test_an_untrained_model_measured_once_stands_against_every_seed() -> None:
    results = pd.concat([rows("digits", "retrieved", 800, [0.64, 0.65, 0.67]), rows("digits", "none", 0, [0.5])])
    contrast = make_verdict(results)["contrasts"][0]
    assert (contrast["a"], contrast["b"], contrast["n"]) == ("retrieved", "none", 3)
    assert contrast["mean"] == pytest.approx(0.1533, abs=1e-4)


def test_sources_are_paired_by_the_seeds_that_both_have() -> None:
    results = pd.concat(
        [rows("digits", "retrieved", 800, [0.6, 0.7, 0.8]), rows("digits", "synthetic", 800, [0.5, 0.62])]
    )
    contrast = make_verdict(results)["contrasts"][0]
    assert contrast["seeds"] == [0, 1]
    assert contrast["differences"] == pytest.approx([0.1, 0.08])


def test_a_source_of_any_name_stands_against_the_untrained_model() -> None:
    results = pd.concat([rows("digits", "zebra", 800, [0.64, 0.65]), rows("digits", "none", 0, [0.5, 0.5])])
    assert [(c["a"], c["b"]) for c in make_verdict(results)["contrasts"]] == [("zebra", "none")]


def test_the_untrained_model_may_be_of_the_primary_pair_and_has_no_equivalence() -> None:
    scored = [rows("digits", "retrieved", scale, [0.6, 0.61, 0.63]) for scale in (40, 80)]
    verdict = make_verdict(pd.concat([*scored, rows("digits", "none", 0, [0.5])]), primary=("retrieved", "none"))
    assert (verdict["headlines"][0]["winner"], verdict["headlines"][0]["scale"]) == ("retrieved", 80)
    assert verdict["equivalences"] == []


def test_a_run_without_the_pair_says_so() -> None:
    verdict = make_verdict(rows("digits", "retrieved", 800, [0.6, 0.7]))
    assert verdict["headlines"][0]["sentence"].startswith(
        "no claim on digits: no seed has both retrieved and synthetic"
    )
    assert verdict["primary"]["family"] == 0


def test_a_nan_score_is_an_error_that_names_the_cell() -> None:
    with pytest.raises(IntegrityError, match="linear_probe_accuracy of digits at n = 800 is NaN"):
        make_verdict(two_sources([0.6, math.nan], [0.5, 0.6]))


@pytest.mark.parametrize(
    ("seeds", "said"), [(2, "Two seeds can never"), (3, "Three seeds can never"), (5, "Five seeds can never")]
)
def test_few_seeds_bring_the_sign_flip_caveat(results_of: Results, seeds: int, said: str) -> None:
    assert make_verdict(results_of(seeds=seeds))["caveats"][0].startswith(
        f"{said} reach p < 0.05 by an exact sign-flip"
    )


def test_six_seeds_need_no_caveat_and_reach_the_sign_flip(results_of: Results) -> None:
    verdict = make_verdict(results_of(seeds=6, spread=0.002))
    assert verdict["caveats"] == []
    assert min(contrast["p_sign_flip"] for contrast in verdict["contrasts"]) == 2 / 2**6


def test_the_pocket_caveat_and_what_is_missing_are_said(results_of: Results) -> None:
    verdict = make_verdict(results_of(), pocket=True, missing=["digits retrieved n=50 seed=3"] * 5)
    assert verdict["caveats"][-1] == "Pocket numbers say nothing about LAION-2B."
    assert "five trials missing" in verdict["caveats"][-2]
    assert "and 2 more" in verdict["caveats"][-2]
    assert not any("Pocket" in caveat for caveat in make_verdict(results_of())["caveats"])


def test_the_verdict_is_valid_json(results_of: Results) -> None:
    verdict = make_verdict(results_of(seeds=1), pocket=True)
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict


def test_equivalence_in_words() -> None:
    """Retrieved rises 5 points a doubling; synthetic at 200 stands where retrieved stands at 100."""
    curves = [rows("digits", "retrieved", n, [v, v]) for n, v in ((50, 0.60), (100, 0.65), (200, 0.70))]
    found = make_verdict(pd.concat([*curves, rows("digits", "synthetic", 200, [0.65, 0.675])]))["equivalences"]
    assert found[0]["sentence"] == (
        "it takes about 119 retrieved images to reach on digits what 200 synthetic images reach (by seed: 100 to 141)."
    )
    assert found[1]["sentence"] == (
        "it takes more than 200 synthetic images to reach on digits what 200 retrieved images reach (by seed: more than 200)."
    )
    assert found[1]["images"] is None


def test_what_is_larger_than_its_scale_says_has_no_equivalence() -> None:
    curves = [rows("digits", "retrieved", n, [v, v]) for n, v in ((50, 0.60), (100, 0.65))]
    added = rows("digits", "synthetic", 100, [0.65, 0.675])
    assert make_verdict(pd.concat([*curves, added]))["equivalences"] != []
    assert make_verdict(pd.concat([*curves, added.assign(n_train=150)]))["equivalences"] == []


def test_text_is_short_and_ends_with_the_caveats(results_of: Results) -> None:
    text = verdict_text(make_verdict(results_of(), pocket=True))
    lines = text.splitlines()
    assert len(lines) <= 16
    assert max(map(len, lines)) <= 100
    assert "Three seeds can never reach p < 0.05 by an exact sign-flip test (least possible: p = 0.25)" in text
    assert lines[-1] == "Pocket numbers say nothing about LAION-2B."
    assert "off the shelf 61.0, retrieved " in text


def test_text_lets_no_control_code_through() -> None:
    hostile = two_sources([0.64, 0.60, 0.65], [0.60, 0.61, 0.62], "\x1b[2Jdigits\u202e")
    text = verdict_text(make_verdict(hostile))
    assert "\x1b" not in text
    assert r"\x1b[2Jdigits\u202e" in text
