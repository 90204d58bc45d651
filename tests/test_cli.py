"""The command line from outside: what is printed where, and which code it ends with."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from retrieve_or_generate import cli
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
        (["tasks", "digits"], "unexpected extra argument"),
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
    assert "Traceback" not in done.stderr


def test_tasks_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert rog("tasks", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "classes", "train", "val", "test"]
    assert [row["task"] for row in json.loads(lines[-1])["tasks"]] == ["digits", "textures", "aircraft"]


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
