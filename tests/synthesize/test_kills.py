"""`rog synthesize` killed while its workers are at work, gone on with, and shared out: one set, whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALL = [
    *("--set", "synthesize.num_inference_steps=2", "--set", "synthesize.batch_size=8"),
    *(
        "--set",
        "curate.keep_fraction=1",
        "--set",
        "synthesize.shard_size=24",
        "--set",
        "retrieve.candidates_per_class=24",
    ),
]


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from retrieve_or_generate.cli import main; main()", *words, *SMALL]
    given = {**os.environ, **environment}
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    said, errors = process.communicate()
    assert process.returncode == code, errors
    return said


def told(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "retrieved"
    ended(start("retrieve", "--task", "textures", "--out", str(out)))
    return out


@pytest.fixture(scope="module")
def whole(like: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "set"
    ended(start("synthesize", "--like", str(like), "--out", str(out), "--jobs", "1"))
    return told(out)


def test_killed_with_its_workers_and_gone_on_with(like: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = ("synthesize", "--like", str(like), "--out", str(out), "--jobs", "2")
    killed = start(*command)
    while killed.poll() is None and not list(out.glob(".unit-*.json")):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in out.glob(".unit-*.json")}
    tars = {path.with_name(path.name[6:11] + ".tar") for path in there}
    before = {path: path.stat().st_mtime_ns for path in tars}
    ended(start(*command))
    assert told(out) == whole
    assert {path: path.stat().st_mtime_ns for path in tars} == before  # what was made stays


def test_ranks_of_slurm_at_once(like: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = ("synthesize", "--like", str(like), "--out", str(out), "--jobs", "1", "--slurm")
    ranks = [start(*command, SLURM_PROCID=str(rank), SLURM_NTASKS="2") for rank in range(2)]
    said = [(*rank.communicate(), rank.returncode) for rank in ranks]
    assert [code for *_, code in said] == [0, 0], said
    assert any("synthetic images of 8 classes" in printed for printed, *_ in said)
    assert told(out) == whole
