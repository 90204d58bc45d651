from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from retrieve_or_generate import store
from retrieve_or_generate.errors import IntegrityError, UsageError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_a_key_depends_on_content_not_on_order(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert store.content_key(value) == store.content_key(turned)
    assert json.loads(store.canonical_json(value)) == value


def test_different_values_have_different_keys() -> None:
    assert len({store.content_key(value) for value in (1, 1.5, "1", [1], {"a": 1}, None)}) == 6


def test_a_key_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.content_key(float("nan"))


def test_json_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"b": "γ", "a": [1, 2.5]})
    store.write_json(tmp_path / "b.json", {"a": [1, 2.5], "b": "γ"})
    assert store.read_json(tmp_path / "a.json") == {"a": [1, 2.5], "b": "γ"}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone.json: no such file"):
        store.read_json(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(IntegrityError, match=r"cut.json: not readable as JSON"):
        store.read_json(tmp_path / "cut.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    store.write_bytes(path, b"old")

    def fail() -> None:
        with store.durable_file(path) as temporary:
            temporary.write_bytes(b"half of the new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_killed_write_leaves_only_what_is_swept_up(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from retrieve_or_generate.store import durable_file\n"
        "with durable_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=False)
    assert not (tmp_path / "file").exists()
    assert len(list(tmp_path.iterdir())) == 1
    store.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def sealed(folder: Path) -> Path:
    store.write_bytes(folder / "part" / "a.bin", b"abc")
    store.write_bytes(folder / "b.bin", b"defg")
    store.seal(folder, "done.json", "key-1", [folder / "b.bin", folder / "part" / "a.bin"], counts={"kept": 2})
    return folder


def test_a_seal_says_what_was_done(tmp_path: Path) -> None:
    record = store.read_seal(sealed(tmp_path), "done.json", key="key-1")
    assert record is not None
    assert record["counts"] == {"kept": 2}
    assert record["files"]["part/a.bin"]["bytes"] == 3
    assert record["files"]["part/a.bin"]["sha256"] == store.sha256_of(tmp_path / "part" / "a.bin")


def test_no_seal_and_another_key_both_mean_not_done(tmp_path: Path) -> None:
    assert store.read_seal(tmp_path, "done.json") is None
    assert store.read_seal(sealed(tmp_path), "done.json", key="key-2") is None


def test_a_changed_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    path = sealed(tmp_path) / "part" / "a.bin"
    path.write_bytes(b"abd")
    with pytest.raises(IntegrityError, match=r"part/a.bin: its bytes changed since it was written"):
        store.read_seal(tmp_path, "done.json")
    path.write_bytes(b"ab")
    with pytest.raises(IntegrityError, match=r"part/a.bin: 2 bytes, but 3 were recorded"):
        store.read_seal(tmp_path, "done.json")
    path.unlink()
    with pytest.raises(IntegrityError, match=r"part/a.bin: missing"):
        store.read_seal(tmp_path, "done.json")
    assert store.read_seal(tmp_path, "done.json", verify=False) is not None


@pytest.mark.parametrize("text", ["[]", '{"key": "k"}', '{"files": {}}', '{"key": "k", "files": []}'])
def test_what_is_no_seal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"not a seal .* Make .* anew"):
        store.read_seal(tmp_path, "done.json")


def test_a_second_holder_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with (
        store.locked(tmp_path),
        pytest.raises(UsageError, match=rf"in use by another run \(process {os.getpid()}\)"),
        store.locked(tmp_path),
    ):
        pass
    with store.locked(tmp_path):
        pass


def test_a_full_disk_names_the_file_that_was_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.bin") as caught, store.durable_file(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": torch.zeros(10**6)}, path),
        lambda path: np.zeros(10**6).tofile(path),
        lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).random(10**5)}), path),
    ],
    ids=["torch", "numpy", "parquet"],
)
def test_a_library_that_does_not_say_that_the_disk_is_full(tmp_path: Path, write: Callable[[Path], None]) -> None:
    def on_a_full_disk() -> None:
        with store.durable_file(tmp_path / "a.bin") as temporary:
            temporary.unlink()
            temporary.symlink_to("/dev/full")
            write(temporary)

    with pytest.raises(OSError, match="No space left") as caught:
        on_a_full_disk()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.bin"))
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_says_in_words_that_the_disk_is_full(tmp_path: Path) -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left") as caught, store.durable_file(tmp_path / "a.bin"):
        raise SafetensorError(words)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.bin"))


def test_another_error_while_writing_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), store.durable_file(tmp_path / "a.bin"):
        raise ZeroDivisionError
    with pytest.raises(OSError, match="Input/output") as caught, store.durable_file(tmp_path / "a.bin"):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.errno == errno.EIO


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with (
        pytest.raises(UsageError, match="set: a file, where a folder is to be written"),
        store.locked(tmp_path / "set"),
    ):
        pass
    assert (tmp_path / "set").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_where_nothing_can_be_written_another_place_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """As on a read-only disk; a real one takes rights that a test has not, or is the root's, who may write anywhere."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, call, refuse)
    told = rf"cannot be written to \({os.strerror(code)}\); "
    with pytest.raises(UsageError, match=rf"one: {told}choose another --out"), store.locked(tmp_path / "one"):
        pass
    with pytest.raises(UsageError, match=rf"sets: {told}choose another --out"):
        store.write_bytes(tmp_path / "sets/a.bin", b"a")
    with pytest.raises(UsageError, match=rf"lists: {told}set ROG_CACHE to a folder that can be"):
        store.write_bytes(tmp_path / "cache/lists/a.bin", b"a")


def test_below_a_file_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(UsageError, match=r"below: cannot be written to \(Not a directory\); choose another --out"):
        store.write_bytes(tmp_path / "set/below/a.bin", b"a")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from retrieve_or_generate.store import locked\n"
        "with locked(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert (tmp_path / ".lock").read_text().strip().isdigit()
    with store.locked(tmp_path):
        pass
