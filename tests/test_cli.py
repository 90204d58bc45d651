"""The command line from outside: what is printed where, and which code it ends with."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest

from retrieve_or_generate import cli
from retrieve_or_generate.cli.options import emit, emit_set
from retrieve_or_generate.errors import IncompleteError, IntegrityError, UsageError
from retrieve_or_generate.store import seal, write_bytes

HEAVY = ("torch", "pandas", "pyarrow", "numpy", "diffusers", "open_clip", "faiss", "matplotlib", "pydantic", "yaml")
VERBS = [command.name or str(command.callback.__name__) for command in cli.app.registered_commands if command.callback]


def rog(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that a refused command ends with."""
    assert rog(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"rog: [^\n]+\n", err)
    return err.removeprefix("rog: ").rstrip("\n")


def test_help_loads_no_library_of_a_stage() -> None:
    script = (
        "import sys\nfrom retrieve_or_generate import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert rog() == 0
    assert "rog compare --seeds 3" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert rog("--version") == 0
    assert re.fullmatch(r"rog \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_as_a_module_which_is_what_torchrun_starts() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "retrieve_or_generate", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"rog \d+\.\d+\.\d+\n", ended.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rog(verb, "--help") == 0
    assert f"rog {verb}" in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retreive"], "No such command 'retreive'. Did you mean 'retrieve'?"),
        (["compare", "--sedes", "3"], "No such option: --sedes .*--seeds"),
        (["report"], "Missing argument"),
        (["tasks", "digits", "dtd"], "unexpected extra argument"),
    ],
)
def test_a_mistyped_command_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, refused(capsys, *arguments))


def ends_with(error: BaseException) -> Callable[..., NoReturn]:
    def verb(*_: Any, **__: Any) -> NoReturn:
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no such\nthing"), 2, "no such thing"),
        (IntegrityError("a.npy: truncated"), 2, "a.npy: truncated"),
        (IncompleteError("3 trials left"), 3, "3 trials left"),
        (OSError(errno.ENOSPC, "No space left on device", "x.tar"), 3, "no space left for x.tar; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (MemoryError(), 3, "out of memory"),
        (
            RuntimeError("[enforce fail at x.cpp] DefaultCPUAllocator: can't allocate memory: 3 bytes"),
            3,
            "out of memory",
        ),
    ],
)
def test_every_failure_has_its_code_and_one_line(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("retrieve_or_generate.report.write_report", ends_with(error))
    assert message in refused(capsys, "report", "run", code=code)


def test_the_traceback_is_there_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROG_TRACEBACK", "1")
    assert rog("report", "nowhere") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("rog: nowhere: not a run")


def test_a_bug_is_no_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieve_or_generate.report.write_report", ends_with(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "run"])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_have_their_codes(name: str, code: int, tmp_path: Path) -> None:
    script = (
        "import os, signal, time\nfrom retrieve_or_generate import cli, report\n"
        f"def interrupted(_):\n    os.kill(os.getpid(), signal.{name}); time.sleep(30)\n"
        "report.write_report = interrupted\ncli.main(['report', 'run'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].endswith("; what is finished is kept, and the same command goes on from there")
    assert "Traceback" not in done.stderr


def test_tasks_as_a_table_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROG_DATA", str(tmp_path))
    assert rog("tasks", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "classes", "train", "val", "test", "files"]
    rows = json.loads(lines[-1])["tasks"]
    plain = ["digits", "textures", "aircraft"]
    assert [row["task"] for row in rows][:7] == [*plain, *(f"{name}-shifted" for name in plain), "imagenet"]
    assert [row["shifts"] for row in rows[2:5]] == [[], ["small"], ["faint"]]
    assert rows[7] == {
        "task": "dtd",
        "classes": 47,
        "train": 1880,
        "val": 1880,
        "test": 1880,
        "shifts": [],
        "files": f"not in {tmp_path}; rog tasks dtd says what to fetch",
    }


def test_verify_tells_damage_from_a_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bytes(tmp_path / "unit" / "a.bin", b"abc")
    seal(tmp_path / "unit", "done.json", "key", [tmp_path / "unit" / "a.bin"])
    assert rog("verify", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"units": 1, "files": 1}
    (tmp_path / "unit" / "a.bin").write_bytes(b"abd")
    assert "a.bin: its bytes changed" in refused(capsys, "verify", str(tmp_path), code=4)
    assert "no such folder" in refused(capsys, "verify", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    assert "nothing with recorded checksums" in refused(capsys, "verify", str(tmp_path / "empty"))


def test_doctor_lists_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert rog("doctor", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(json.loads(lines[-1])["checks"]) == len(lines) - 1
    assert os.environ["ROG_CACHE"] in "\n".join(lines)


QUICK = [
    *("--set", "retrieve.candidates_per_class=16", "--set", "curate.keep_fraction=1"),
    *("--set", "synthesize.num_inference_steps=2", "--set", "finetune.updates=2"),
]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def test_the_stages_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage needs nothing but the folder that the one before wrote."""
    found, made, near = (str(tmp_path / name) for name in ("found", "made", "near"))
    assert rog("retrieve", "--task", "textures", "--out", found, "--json", *QUICK) == 0
    kept = told(capsys)["kept"]
    assert rog("synthesize", "--like", found, "--out", made, "--json", *QUICK) == 0
    assert told(capsys)["source"] == "synthetic"
    assert rog("synthesize", "--init", found, "--strength", "0,0.5", "--out", near, "--json", *QUICK) == 0
    assert told(capsys)["out"] == f"{near}-0.5"
    mixed = ("--train", f"{near}-0", "--train", made, "--scale", "16", "--gamma", "0.3")
    assert rog("finetune", *mixed, "--out", str(tmp_path / "trial"), *QUICK) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'trial'}: 16 images, 2 updates")
    assert said.splitlines()[1].startswith("zero_shot_accuracy")
    assert rog("finetune", *mixed, "--out", str(tmp_path / "trial"), *QUICK) == 0
    assert capsys.readouterr().out == said, "read back"
    assert "the 10 of task 'digits'" in refused(capsys, "finetune", "--train", made, "--task", "digits", *QUICK)
    assert "share only" in refused(capsys, "finetune", "--train", made, "--scale", "99999", *QUICK)
    assert rog("finetune", "--task", "textures", "--out", str(tmp_path / "shelf"), "--json") == 0
    assert 0 < told(capsys)["metrics"]["zero_shot_accuracy"] < 1
    assert rog("verify", str(tmp_path), "--json") == 0
    assert told(capsys)["units"] >= 6
    assert kept >= 16


def test_classes_that_a_set_leaves_out_or_searched_with_less_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = pd.DataFrame({"reason": ["", "", "short_class"]})
    made: Any = SimpleNamespace(
        folder="sets/x",
        source="retrieved",
        task="birds",
        excluded=("cat", "dog"),
        manifest=manifest,
        counts=lambda: np.array([2, 0, 0]),
        record={"config": {"few_examples": {"ape": 4, "dog": 3}}},
    )
    emit_set(made, as_json=True)
    text, left_out, few, record = capsys.readouterr().out.splitlines()
    assert text == "sets/x: 2 retrieved images of 3 classes (0 to 2 a class), of 3 candidates (dropped: 1 short_class)"
    assert left_out == "  classes left out: cat, dog"
    assert few == "  fewer training images to search with than retrieve.examples_per_class in 2 classes (3 of 'dog')"
    assert json.loads(record)["excluded"] == ["cat", "dog"]
    assert json.loads(record)["few_examples"] == {"ape": 4, "dog": 3}


def test_an_index_is_built_checked_and_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "index")
    assert rog("index", "build", "pocket", "--out", folder) == 0
    assert rog("index", "verify", folder, "-k", "10", "--json") == 0
    assert told(capsys)["recall_at_k"] > 0.9
    assert rog("index", "search", folder, "a photo of a falcon", "-k", "3", "--json") == 0
    rows = told(capsys)["results"]
    assert len(rows) == 3
    assert rows[0]["similarity"] >= rows[2]["similarity"]
    published = shutil.copytree(folder, tmp_path / "published")
    (published / "index.json").unlink()
    assert rog("index", "verify", str(published), "--pool", "pocket", "--recipe", "pocket", "-k", "10") == 0
    assert f"{published}: readable (nobody recorded its checksums); 100% of" in capsys.readouterr().out
    (tmp_path / "index" / "populated.index").write_bytes(b"damaged")
    assert "populated.index" in refused(capsys, "index", "verify", folder, code=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrieve", "--task", "digit"], "unknown task 'digit'; did you mean 'digits'?"),
        (["retrieve", "--pool", "pockt"], "unknown pool 'pockt'"),
        (["retrieve", "--set", "model=pockt"], "unknown model 'pockt'"),
        (["retrieve", "--device", "gpu0"], "unknown device 'gpu0': give cpu, cuda or cuda:N"),
        (["retrieve", "gone.yaml"], "gone.yaml: no such experiment file"),
        (["compare", "--seeds", "0"], "seeds: input should be greater than or equal to 1, not '0'"),
        (["compare", "--set", "sources=[sintetic]"], "unknown source 'sintetic'; did you mean 'synthetic'?"),
        (["compare", "--set", "taskz=[digits]"], "unknown key 'taskz'; did you mean 'tasks'?"),
        (["compare", "--set", "tasks=[digit]"], "unknown task 'digit'"),
        (["synthesize"], "give either the image set to match (--like SET) or the one to perturb"),
        (["synthesize", "--like", "gone"], "gone"),
        (["synthesize", "--init", "gone", "--strength", "much"], "--strength 'much': numbers from 0 to 1 with commas"),
        (["synthesize", "--like", "gone", "--rank", "0"], "give --rank and --world together, or --slurm alone"),
        (["synthesize", "--like", "gone", "--rank", "2", "--world", "2"], "rank 2 of 2: ranks go from 0"),
        (
            ["synthesize", "--like", "gone", "--slurm"],
            "--slurm: no SLURM_PROCID and SLURM_NTASKS here; start with srun",
        ),
        (
            ["synthesize", "--like", "gone", "--device", "cpu,cpu"],
            "--device cpu,cpu: several are GPUs by number, each once",
        ),
        (["finetune"], "give the image set to train on (--train SET)"),
        (["finetune", "--train", "gone"], "gone"),
        (["finetune", "--set", "finetune.learning_rates=[0]"], "learning_rates.0: input should be greater than 0"),
        (
            ["finetune", "--set", "finetune.adversarial=4", "--set", "finetune.loss=contrastive"],
            "finetune: adversarial goes with loss: cross_entropy",
        ),
        (["finetune", "--task", "textures", "--scale", "5"], "scale 5: images of a set"),
        (["finetune", "--set", "finetune.epochs=3"], "epochs goes with another recipe; with recipe: equal_updates say"),
        (["finetune", "--set", "finetune.recipe=paper", "--set", "finetune.updates=9"], "recipe: paper say epochs"),
        (["finetune", "--task", "textures", "--gamma", "0.5"], "gamma 0.5: it weighs the losses of two image sets"),
        (["index", "build", "pockt"], "unknown index recipe 'pockt'; did you mean 'pocket'?"),
        (["index", "search", "gone", "falcon"], "gone: no finished index"),
        (["index", "serch"], "Did you mean 'search'?"),
        (["status", "gone"], "gone: not a run"),
        (["retrieve", "--task", ""], "--task is empty; give it a value or leave it out"),
        (["retrieve", "--pool="], "--pool is empty"),
        (["synthesize", "--like", "", "--out", "x"], "--like is empty"),
        (["verify", ""], "an argument is empty"),
        (["retrieve", "--set", "tasks=['']"], "a task without a name"),
        (["retrieve", "--out", f"{__file__}/below"], "cannot be written to (Not a directory); choose another --out"),
        (["retrieve", "--out", "/proc/none"], "cannot be written to (No such file or directory); choose another --out"),
        (["retrieve", "--set", "pool=''"], "unknown pool ''"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


SHELF = ["--set", "sources=[none]", "--set", "tasks=[textures]", "--seeds", "1"]


def test_a_comparison_its_state_and_a_second_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert rog("compare", *SHELF, "--jobs", "1", "--out", str(run), "--json") == 0
    out, err = capsys.readouterr()
    assert f"report: {run / 'report.html'}" in out.splitlines()
    assert json.loads(out.splitlines()[-1])["verdict"]["headlines"][0]["status"] == "no_claim"
    told_by_then = [
        line for line in err.splitlines() if not line.startswith("building the pocket world")
    ]  # if not there yet
    assert told_by_then[0] == "trials: 0/1"
    assert rog("status", str(run), "--json") == 0
    assert {"sets": [0, 0], "trials": [1, 1], "report": True}.items() <= told(capsys).items()
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert rog("compare", *SHELF, "--out", str(run)) == 0
    assert "trials" not in capsys.readouterr().err
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert "holds another experiment (sources differ)" in refused(capsys, "compare", *SHELF[2:], "--out", str(run))
    assert rog("report", str(run)) == 0
    capsys.readouterr()
    next(run.glob("trials/*/result.json")).unlink()
    assert rog("status", str(run), "--json") == 0
    assert {"trials": [0, 1], "report": False}.items() <= told(capsys).items()


def test_names_of_others_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    emit("jay\x1b[2J\nrook", {"name": "jay\x1b"}, as_json=True)
    assert capsys.readouterr().out.splitlines() == [r"jay\x1b[2J", "rook", r'{"name": "jay\u001b"}']
    assert rog("tasks", "no\x1b[31mne") == 2
    assert "\x1b" not in capsys.readouterr().err
