"""How much memory there is: of this machine, and of the control groups that this process is in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MACHINE, _OWN, _OWN_GROUPS = Path("/proc/meminfo"), Path("/proc/self/smaps_rollup"), Path("/proc/self/cgroup")
_GROUPS = (  # what the line of a process's own group begins with; where groups lie; limit, taken, and cached files in memory.stat
    ("0::", Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        r"\d+:memory:",
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def memory_bytes() -> int:
    """Physical memory, or what a control group leaves of it."""
    return min([_physical(), *(most for most, _ in _groups())])


def available_bytes() -> int:
    """What may still be taken without swapping: files that are only cached count as free."""
    with suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MACHINE.read_text(), re.MULTILINE)
        if found:
            return max(0, min([int(found[1]) * 1024, *(most - taken for most, taken in _groups())]))
    return _physical()


def own_bytes() -> int:
    """What this process holds and shares with no other; 0 where the system does not say."""
    with suppress(OSError):
        parts = re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", _OWN.read_text(), re.MULTILINE)
        return 1024 * sum(map(int, parts))
    return 0


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups() -> Iterator[tuple[int, int]]:
    """Of each control group above this process that has a limit: bytes allowed, and bytes taken but for cached files."""
    for begins, top, limit, taken, cached in _GROUPS:
        with suppress(OSError):
            own = re.search(rf"^{begins}/(.*)$", _OWN_GROUPS.read_text(), re.MULTILINE)
            folder = top / (own[1] if own else "")
            for group in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # a group without a limit says "max", or has no such file
                    most = int((group / limit).read_text())
                    files = re.search(rf"^{cached} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                    yield most, int((group / taken).read_text()) - (int(files[1]) if files else 0)
                if group == top:
                    break


def said(count: int | float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
