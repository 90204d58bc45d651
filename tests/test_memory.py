from __future__ import annotations

from pathlib import Path

import pytest

from retrieve_or_generate import memory
from retrieve_or_generate.memory import available_bytes, memory_bytes, own_bytes, said


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available, and a process in group /jobs/mine without a limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   8388608 kB\n")
    (tmp_path / "own").write_text("4:memory:/jobs/mine\n0::/jobs/mine\n")
    (tmp_path / "groups/jobs/mine").mkdir(parents=True)
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", [(one[0], tmp_path / "groups", *one[2:]) for one in memory._GROUPS])
    return tmp_path / "groups"


@pytest.mark.parametrize(
    ("limit", "taken", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_narrowest_group_counts_and_cached_files_are_free(
    machine: Path, limit: str, taken: str, cached: str
) -> None:
    physical = memory_bytes()
    assert available_bytes() == 8 << 30
    (machine / "jobs" / limit).write_text(f"{4 << 30}\n")
    (machine / "jobs" / taken).write_text(f"{3 << 30}\n")
    (machine / "jobs/memory.stat").write_text(f"anon 5\n{cached} {1 << 30}\n")
    assert available_bytes() == 2 << 30
    assert memory_bytes() == min(4 << 30, physical)
    (machine / "jobs/mine" / limit).write_text("max\n")
    assert available_bytes() == 2 << 30
    (machine / "jobs" / taken).write_text(f"{9 << 30}\n")
    assert available_bytes() == 0


def test_a_system_that_does_not_say(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MACHINE", "_OWN", "_OWN_GROUPS"):
        monkeypatch.setattr(memory, name, machine / "nowhere")
    assert available_bytes() == memory_bytes() > 0
    assert own_bytes() == 0


def test_own_memory_grows_with_what_is_held() -> None:
    before = own_bytes()
    held = bytes(bytearray(64 << 20))
    assert own_bytes() - before > len(held) / 2


def test_bytes_in_words() -> None:
    assert (said(3 << 29), said(300 << 20)) == ("1.5 GiB", "300 MiB")
