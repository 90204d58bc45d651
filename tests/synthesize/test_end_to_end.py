"""`rog synthesize` as a user has it: every strategy on a Stable Diffusion 1.5 of random weights, from a folder and from a hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from retrieve_or_generate import api
from retrieve_or_generate.experiment import load_experiment
from retrieve_or_generate.image_set import load_image_set
from retrieve_or_generate.synthesize.prompts import STRATEGIES
from retrieve_or_generate.synthesize.unsaid import unsaid
from retrieve_or_generate.weights import find_generator

from .builders import save
from .hub import Repository, commit_of, hub

PROGRESS = re.compile(r"[a-z ,]+: [\d.]+( \w+)?/[\d.]+( \w+)?(, .*)?")
CURATION = ("curate.keep_fraction=1", "curate.on_short_class=exclude")
COMMIT = commit_of("published")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with unsaid():
        return save("sd1", tmp_path_factory.mktemp("generators") / "sd15", checker=True)


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images a class of the pocket pool, with their captions."""
    out = tmp_path_factory.mktemp("sets") / "retrieved"
    api.retrieve("textures", out, load_experiment(None, ("retrieve.candidates_per_class=16", *CURATION)))
    return out


def asked(generator: object, *more: str) -> tuple[str, ...]:
    return (f"generator={generator}", "synthesize.num_inference_steps=2", *CURATION, *more)


def made_here(like: Path, out: Path, *overrides: str) -> pd.DataFrame:
    """The manifest of a synthetic set."""
    return api.synthesize(out, like=like, experiment=load_experiment(None, overrides), jobs=1).manifest


def rog(like: Path, out: Path, *overrides: str, **environment: str) -> str:
    """The same by the command line, in a process of its own; what it said on stderr."""
    words = ["synthesize", "--like", str(like), "--out", str(out), "--jobs", "1"]
    words += [word for one in overrides for word in ("--set", one)]
    command = [sys.executable, "-c", "from retrieve_or_generate.cli import main; main()", *words]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def kept(manifest: pd.DataFrame) -> dict[int, int]:
    return manifest[manifest["rank"] >= 0].groupby("label").size().to_dict()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(strategy: str, folder: Path, retrieved: Path, tmp_path: Path) -> None:
    more = [f"synthesize.prompts.strategy={strategy}"]
    if strategy == "file":
        names = load_image_set(retrieved).class_names
        (tmp_path / "prompts.tsv").write_text("".join(f"{name}\tsome {name} cloth\n" for name in names))
        more.append(f"synthesize.prompts.file={tmp_path / 'prompts.tsv'}")
    manifest = made_here(retrieved, tmp_path / "set", *asked(folder, *more))
    assert kept(manifest) == kept(load_image_set(retrieved).manifest)
    assert {json.loads(origin)["generator"] for origin in manifest["origin"]} == {find_generator(str(folder)).name}


def test_a_hub_gives_the_images_that_the_folder_gives(folder: Path, retrieved: Path, tmp_path: Path) -> None:
    out, overrides = tmp_path / "there", asked("org/sd")
    with hub({"org/sd": Repository({COMMIT: folder}, {"main": COMMIT})}) as served:
        environment = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        said = rog(retrieved, out, *overrides, **environment)
    there, here = load_image_set(out).manifest, made_here(retrieved, tmp_path / "here", *asked(folder))
    assert {json.loads(origin)["generator"] for origin in there["origin"]} == {f"org/sd@{COMMIT}"}
    assert there["sha256"].tolist() == here["sha256"].tolist()
    assert all(PROGRESS.fullmatch(line) for line in said.splitlines()), said
    before = (out / "image_set.json").stat().st_mtime_ns
    rog(retrieved, out, *overrides, **environment)  # the hub is gone: the commit that it named last is what is there
    assert (out / "image_set.json").stat().st_mtime_ns == before
