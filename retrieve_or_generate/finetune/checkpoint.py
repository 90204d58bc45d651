"""A trial under way, kept so that it goes on where it was stopped, to the same bits on a CPU.

Reads and writes a folder beside what the trial will be: `state-<n>.pt`, then `checkpoint.json`, the seal that names it, so a state
that was not written whole is never gone on from. The seal carries the trial's key; a state of another trial is none of this one's.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.finetune.distributed import ALONE, World
from retrieve_or_generate.store import (
    LOCK,
    TEMPORARY_PREFIX,
    content_key,
    durable_file,
    read_seal,
    remove_leftovers,
    seal,
)

FOLDER, SEAL = "checkpoint", "checkpoint.json"
_VERSION = 2  # of what a state holds

Position = tuple[int, int]
"""Which learning rate of the list is under way, and after how many of its updates."""


class Checkpoint:
    """The state of the trial with this `key`, in `folder`: saved after every `every` updates (0: never) and on SIGTERM.

    In a `world` of several processes the first one saves, all load, and a SIGTERM to any of them ends all.
    """

    def __init__(self, folder: Path, key: str, every: int = 0, world: World = ALONE):
        self.folder, self.every, self.world = folder, every, world
        self.key = content_key(["checkpoint", _VERSION, key])
        self._saved: Position = (0, 0)
        self._terminated = False

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None where there is none of this trial.

        Raises:
            IntegrityError: it was changed since.
        """
        try:
            sealed = read_seal(self.folder, SEAL, self.key)
        except IntegrityError as error:
            raise IntegrityError(f"{error}: remove it, and the trial begins anew") from error
        at = (sealed["rate"], sealed["update"]) if sealed else None
        self.world.agree(
            (self.key, at), "the processes find different data or checkpoints: all need a disk that they share"
        )
        if sealed is None:
            return None
        (name,) = sealed["files"]
        self._saved = sealed["rate"], sealed["update"]
        return dict(torch.load(self.folder / name, map_location="cpu", weights_only=True))

    def save(self, position: Position, state: dict[str, Any]) -> None:
        """Keep `state`, tensors and plain values, in place of the one before."""
        path = self.folder / f"state-{position[0]}-{position[1]}.pt"
        with durable_file(path) as temporary:
            torch.save(state, temporary)
        seal(self.folder, SEAL, self.key, [path], rate=position[0], update=position[1])
        for other in self.folder.glob("state-*.pt"):
            if other != path:
                other.unlink()
        remove_leftovers(self.folder)
        self._saved = position

    def pause(self, position: Position, state: Callable[[], dict[str, Any]]) -> None:
        """Between two updates: save where that is due; `SystemExit` 143 when a process was told to terminate."""
        due = self.every and position[1] % self.every == 0 and position > self._saved
        terminated = self.world.any(self._terminated)
        if (due or terminated) and self.world.first:
            self.save(position, state())
        if terminated:
            self.world.wait()  # whoever ends first may have the others ended
            raise SystemExit(128 + signal.SIGTERM)

    def remove(self) -> None:
        """Once the trial is sealed, nobody goes on with it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """SIGTERM waits for the next `pause`, which saves; without one, it acts at the end. Signals reach the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.world.any(self._terminated):
            raise SystemExit(128 + signal.SIGTERM)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True


def is_only_checkpoint(folder: Path, checkpoint: Checkpoint) -> bool:
    """Whether `folder` holds nothing but a state of this trial, or the beginnings of one."""
    others = [entry for entry in folder.iterdir() if entry.name not in (FOLDER, LOCK)]
    if not all(entry.name.startswith(TEMPORARY_PREFIX) for entry in others):
        return False
    sealed = read_seal(checkpoint.folder, SEAL, verify=False)
    return sealed is None or sealed["key"] == checkpoint.key
