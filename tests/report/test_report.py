"""The whole report: from a run folder to its page, as a reader and as an attacker would meet it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.report import write_report
from retrieve_or_generate.report.run import COLUMNS, open_run, read_results

CAVEAT = "Pocket numbers say nothing about LAION-2B."
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}",
    "=cmd|' /C calc'!A0",
    "\x1b[2J\u202e",
)


class Page(HTMLParser):
    """Every element, attribute and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reported(_finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report; not to be written to."""
    folder = Path(shutil.copytree(_finished_run, tmp_path_factory.mktemp("reported") / "run"))
    assert write_report(folder) == folder / "report.html"
    return folder


def test_the_report_writes_what_it_promises_and_changes_nothing_else(reported: Path, run_folder: Path) -> None:
    before, after = contents(run_folder), contents(reported)
    assert {name: after[name] for name in before} == before
    new = set(after) - set(before)
    assert {"report.html", "results.csv", "verdict.json", "figures/accuracy.svg", "figures/cost.svg"} <= new
    assert {name for name in new if not name.startswith("figures/")} == {"report.html", "results.csv", "verdict.json"}
    assert len(pd.read_csv(reported / "results.csv")) == len(pd.read_parquet(reported / "results.parquet"))


def test_another_process_writes_the_same_bytes_without_torch(reported: Path, run_folder: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from retrieve_or_generate.report import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]))\n"
        "assert not {'torch', 'open_clip', 'diffusers', 'faiss', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7", "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "-c", script, str(run_folder)], check=True, env=environment, timeout=60)
    assert contents(run_folder) == contents(reported)


def test_the_page_fetches_and_runs_nothing(reported: Path) -> None:
    page = page_of(reported)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_the_policy_allows_this_style_sheet_and_no_other(reported: Path) -> None:
    html = (reported / "report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = next(str(meta["content"]) for meta in page_of(reported).all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"style-src 'sha256-{digest}'" in policy


def test_every_link_on_the_page_leads_somewhere(reported: Path) -> None:
    page = page_of(reported)
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {str(link["href"])[1:] for link in page.all("a")} <= anchors


def test_every_picture_is_told_in_words(reported: Path) -> None:
    images = page_of(reported).all("img")
    assert len(images) > 60
    assert all(image["alt"] for image in images)
    assert any("retrieved 200" in str(image["alt"]) or "retrieved n=200" in str(image["alt"]) for image in images)


def test_the_page_says_the_verdict_and_the_caveats(reported: Path) -> None:
    text = page_of(reported).text.replace("\xa0", " ").replace("−", "-")
    verdict = json.loads((reported / "verdict.json").read_text())
    for headline in verdict["headlines"]:
        assert headline["sentence"][1:] in text
    for caveat in verdict["caveats"]:
        assert caveat in text
    assert text.count(CAVEAT) >= 2
    for words in ("dead link", "low CLIP score", "perturbed 0.4", "torch", "equal_updates", "synthesize", "vulcan 4"):
        assert words in text


def test_sets_that_only_show_a_strength_are_in_the_strip_and_nowhere_else(reported: Path) -> None:
    page = page_of(reported)
    assert "perturbed 0.8" not in page.text
    assert sum("the same at strength 0.8" in str(image["alt"]) for image in page.all("img")) == 3  # one a task


def only_digits(folder: Path, **changes: object) -> pd.DataFrame:
    """Make a run smaller, so that its report is quick, and change its experiment file. Returns its results."""
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"tasks": ["digits"]} | changes))
    results = pd.read_parquet(folder / "results.parquet")
    results = results[results["task"] == "digits"]
    results.to_parquet(folder / "results.parquet", index=False)
    return results


def test_a_mixture_has_no_set_and_its_own_name_curve_and_words(
    run_folder: Path, rewrite: Callable[[Path, pd.DataFrame], None]
) -> None:
    path = run_folder / "experiment.yaml"
    values = yaml.safe_load(path.read_text())
    values["sources"] = [*values["sources"], "mixed-half", "mixed-more"]
    of = ["retrieved", "synthetic"]
    values["variants"] = {
        "mixed-half": {"mix": {"of": of, "gamma": 0.3}},
        "mixed-more": {"mix": {"of": of, "counts": [200, None]}},
    }
    path.write_text(yaml.safe_dump(values))
    results = read_results(run_folder / "results.parquet")
    mine = results[results["source"] == "perturbed"]
    rows = pd.concat([results, *(mine.assign(source=name) for name in ("mixed-half", "mixed-more"))])
    rewrite(run_folder, rows)
    write_report(run_folder)
    page = (run_folder / "report.html").read_text()
    assert "mixed-more: 200 retrieved and n synthetic images" in page
    assert (
        "50 % of the images retrieved, the others synthetic, half of each batch from each, the loss 0.3 of the" in page
    )
    assert "same number of updates, but for mixtures by count." in page
    assert any(">mixed half<" in path.read_text() for path in (run_folder / "figures").iterdir())
    assert "lacks" not in page


def test_outside_the_pocket_world_the_caveat_is_about_other_peoples_images(run_folder: Path) -> None:
    only_digits(run_folder, pool="laion", model="ViT-B-16/x", generator="sd")
    write_report(run_folder)
    text = page_of(run_folder).text
    assert "Pocket" not in text
    assert "do not publish this page" in text


def test_a_run_that_lacks_trials_and_sets_says_so(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "sets")
    only_digits(run_folder, seeds=4)
    write_report(run_folder)
    text = page_of(run_folder).text
    assert "This run is incomplete: nine trials missing" in text
    assert "This run holds no image sets." in text
    assert "What curation removed" not in text


@pytest.mark.parametrize("sources", [["none"], ["none", "synthetic"], ["retrieved"]])
def test_an_experiment_without_the_pair_has_a_report_too(run_folder: Path, sources: list[str]) -> None:
    results = only_digits(run_folder, sources=sources)
    results[results["source"].isin(sources)].to_parquet(run_folder / "results.parquet", index=False)
    write_report(run_folder)
    text = page_of(run_folder).text
    assert "No claim on digits: no seed has both retrieved and synthetic at one scale." in text
    assert "missing" not in text
    assert ("CLIP off the shelf on one task, no source to compare" in text) == (sources == ["none"])


def test_text_from_outside_stays_text(run_folder: Path, make_set: Callable[..., None]) -> None:
    shutil.rmtree(run_folder / "sets")
    make_set(run_folder / "sets" / "digits" / "retrieved", "digits", "retrieved", 1, class_names=HOSTILE * 2)
    make_set(
        run_folder / "sets" / "digits" / "=evil", "digits", HOSTILE[1], 1, class_names=HOSTILE * 2, caption=HOSTILE[0]
    )
    environment = {name: name for name in HOSTILE}
    (run_folder / "environment.json").write_text(json.dumps(environment))
    stage = {"stage": HOSTILE[0], "task": HOSTILE[1], "source": HOSTILE[4], "wall_seconds": 1.0, "images": 1}
    (run_folder / "stages.json").write_text(json.dumps([stage]))
    results = only_digits(run_folder).replace({"source": {"perturbed": HOSTILE[3]}})
    results["device"] = HOSTILE[0]
    results.to_parquet(run_folder / "results.parquet", index=False)
    write_report(run_folder)
    page = page_of(run_folder)
    assert not page.all("script")
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert HOSTILE[0] in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in page.text + (run_folder / "verdict.json").read_text()
    assert "\u202e" not in page.text
    assert ",'=cmd|" in (run_folder / "results.csv").read_text()


@pytest.mark.parametrize("name", ["experiment.yaml", "results.parquet", "environment.json", "stages.json"])
def test_a_missing_file_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    with pytest.raises(UsageError, match=re.escape(name)):
        write_report(run_folder)


@pytest.mark.parametrize("name", ["results.parquet", "environment.json", "stages.json"])
def test_a_truncated_file_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).write_bytes((run_folder / name).read_bytes()[:20])
    with pytest.raises(IntegrityError, match=re.escape(name)):
        write_report(run_folder)


def test_a_changed_image_set_is_not_shown(run_folder: Path) -> None:
    shard = run_folder / "sets" / "digits" / "retrieved" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"00000\.tar"):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()


def test_a_number_without_its_trial_is_refused(run_folder: Path) -> None:
    trial = sorted((run_folder / "trials").iterdir())[0]
    (trial / "result.json").unlink()
    with pytest.raises(IntegrityError, match=re.escape(trial.name)):
        write_report(run_folder)


@pytest.mark.parametrize("name", ["../../outside", "", "/etc"])
def test_a_trial_name_that_is_a_path_is_refused(
    run_folder: Path, rewrite: Callable[[Path, pd.DataFrame], None], name: str
) -> None:
    results = pd.read_parquet(run_folder / "results.parquet").assign(trial=name)
    results.to_parquet(run_folder / "results.parquet", index=False)
    with pytest.raises(IntegrityError, match="no folder name"):
        open_run(run_folder)


def test_results_of_another_form_are_refused(run_folder: Path) -> None:
    results = pd.read_parquet(run_folder / "results.parquet")
    path = run_folder / "results.parquet"
    results.drop(columns="split").to_parquet(path, index=False)
    with pytest.raises(IntegrityError, match="columns"):
        open_run(run_folder)
    results.head(0).to_parquet(path, index=False)
    with pytest.raises(UsageError, match="no rows"):
        open_run(run_folder)
    pd.concat([results, results.head(1)]).to_parquet(path, index=False)
    with pytest.raises(IntegrityError, match="measured twice"):
        open_run(run_folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run"):
        write_report(tmp_path)


def test_missing_cells_are_listed_and_an_unseeded_baseline_is_not(run_folder: Path) -> None:
    results = pd.read_parquet(run_folder / "results.parquet")
    gone = (results["task"] == "aircraft") & (results["source"] == "synthetic") & (results["seed"] == 2)
    kept = results[~gone & ~((results["source"] == "none") & (results["seed"] > 0))]
    kept.to_parquet(run_folder / "results.parquet", index=False)
    run = open_run(run_folder)
    assert run.missing() == [f"aircraft synthetic n={scale} seed=2" for scale in (50, 100, 200)]
    assert tuple(run.results.columns) == COLUMNS
