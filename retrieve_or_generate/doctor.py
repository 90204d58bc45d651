"""What `rog doctor` looks at: whether this environment can do the work, and what to do where it cannot.

Reads the installed packages and the machine; writes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from retrieve_or_generate import __version__
from retrieve_or_generate.executors import core_count

_PYTHONS = ((3, 11), (3, 12))
_PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "diffusers",
    "transformers",
    "numpy",
    "pandas",
    "pyarrow",
    "img2dataset",
)
_LEAST_FREE_GIB = 2.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing looked at: `ok` false means that something will fail; `advice` says what to do about it."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def python_check(running: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Whether this Python is one the pinned set was tested on."""
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    return Check("python", running in _PYTHONS, found, "make the environment with Python 3.11 or 3.12")


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_checks(find: Callable[[str], str | None] = installed) -> Iterator[Check]:
    """The versions of what does the work; a missing one is a fault."""
    for name in _PACKAGES:
        found = find(name)
        yield Check(name, found is not None, found or "missing", "pip install -c constraints.txt -e .")


def faiss_check(find: Callable[[str], str | None] = installed) -> Check:
    """faiss-gpu and faiss-cpu write the same files: installed together, one has silently overwritten the other."""
    both = {name: find(name) for name in ("faiss-gpu", "faiss-cpu")}
    found = ", ".join(f"{name} {number}" for name, number in both.items() if number) or "missing"
    if all(both.values()):
        return Check("faiss", False, found, "pip uninstall faiss-cpu faiss-gpu, then install one of them alone")
    if not any(both.values()):
        return Check("faiss", False, found, "pip install -c constraints.txt -e .")
    try:
        import faiss
    except ImportError as error:
        return Check(
            "faiss", False, f"{found}, but it does not import ({error})", "install faiss-gpu or faiss-cpu anew"
        )
    gpu = hasattr(faiss, "StandardGpuResources")
    fits = gpu == (both["faiss-gpu"] is not None)
    return Check("faiss", fits, f"{found}, {'GPU and CPU' if gpu else 'CPU'} code", "uninstall it and install it anew")


def torch_check() -> Check:
    """Whether torch and torchvision are a pair: a mismatched torchvision has no operators."""
    try:
        import torch
        import torchvision

        boxes = torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        return Check("torch pair", False, str(error).splitlines()[0], "install torch and torchvision of one release")
    return Check(
        "torch pair", len(boxes) == 1, f"torch {torch.__version__} and torchvision {torchvision.__version__} fit"
    )


def device_check() -> Check:
    """What `--device` can be. No GPU is no fault."""
    try:
        import torch
    except ImportError as error:
        return Check("device", False, str(error), "pip install -c constraints.txt -e .")
    if not torch.cuda.is_available():
        return Check("device", True, "cpu (no CUDA device)")
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return Check("device", True, "cpu, " + ", ".join(names))


def memory_gib() -> float | None:
    """Physical memory, None where the system does not say."""
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    return None


def machine_check() -> Check:
    memory = memory_gib()
    set_threads = os.environ.get("OMP_NUM_THREADS", "unset")
    found = f"{core_count()} cores, {'unknown' if memory is None else f'{memory:.1f} GiB of'} memory, OMP_NUM_THREADS {set_threads}"
    return Check("machine", True, found)


def disk_check(name: str, folder: Path) -> Check:
    """Free space where `folder` is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / _GIB
    writable = os.access(existing, os.W_OK)
    found = f"{folder}: {free:.1f} GiB free" + ("" if writable else ", not writable")
    return Check(
        name,
        writable and free >= _LEAST_FREE_GIB,
        found,
        f"free {_LEAST_FREE_GIB:g} GiB there, or choose another folder",
    )


def decoded_check(cache: Path) -> Check:
    """How much of the cache folder decoded images take (`finetune/decoded.py`). However much, it is no fault."""
    sizes = [path.stat().st_size for path in (cache / "decoded").glob("*.npy")]
    found = (
        f"{len(sizes)} sets and splits, {sum(sizes) / _GIB:.1f} GiB in {cache / 'decoded'}; made again where deleted"
    )
    return Check("decoded images", True, found if sizes else "none")


def examine(cache: Path, runs: Path = Path("runs")) -> list[Check]:
    """Every check, in the order in which faults explain each other."""
    return [
        Check("rog", True, __version__),
        python_check(),
        *package_checks(),
        faiss_check(),
        torch_check(),
        device_check(),
        machine_check(),
        disk_check("cache", cache),
        decoded_check(cache),
        disk_check("results", runs),
    ]


def as_text(checks: Iterable[Check]) -> str:
    """One line a check; advice under what is broken."""
    lines = []
    for check in checks:
        lines.append(f"{'ok   ' if check.ok else 'FAULT'}  {check.name:<16} {check.found}")
        if not check.ok:
            lines.append(f"       {'':<16} {check.advice}")
    return "\n".join(lines)
