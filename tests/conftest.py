"""What holds for every test: one thread, no network but loopback, no model hub, and one pocket world for the whole session.

Environment variables are set here, before any test module imports the libraries that read them; child processes inherit them.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ |= {"HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "MPLBACKEND": "agg"}

# A suite started in the background inherits "ignore interrupts", and would hand it to the programs whose interruption it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache folder, shared by the workers of a parallel run: the pocket world is built once, from the code under test.

    ROG_TEST_CACHE names a folder that keeps the world from run to run, for work on something else.
    """
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder) / "rog-cache"
    shared = Path(os.environ.get("ROG_TEST_CACHE", shared))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROG_CACHE", str(shared))
        yield shared


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections and name look-ups that leave this machine fail at once and say so."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to connect to {address[0]}")
        connect(self, address)

    def guarded_look_up(host: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not name.startswith(_LOOPBACK):
            raise socket.gaierror(socket.EAI_FAIL, f"a test tried to look up {name}")
        return look_up(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield
