"""How far long work is: a bar with rate and time left on a terminal, plain lines now and then where output is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many of it are done, and how many there are."""

_BAR = 24


class Bytes(int):
    """A number of bytes: given as `done` and `total`, they are shown as 1.5 GB and paced in bytes per second."""


def amount(number: float, of: int) -> str:
    """`number` as one of what `of` counts: 12, or 3.2 GB."""
    if not isinstance(of, Bytes):
        return f"{number:.3g}" if isinstance(number, float) else str(number)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def bytes_of(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """Tells `progress` of `what`, given bytes done and bytes in all."""
    if progress is None:
        return None
    tell = progress
    return lambda done, total: tell(what, Bytes(done), Bytes(total))


def duration(seconds: float) -> str:
    """`4 s`, `2 min 05 s`, `3 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressLine:
    """A `Progress` that writes to `stream` (stderr). Rate and time left are of the work named now, since its first call."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, every_seconds: float = 10.0
    ):
        self._stream, self._clock, self._every = stream or sys.stderr, clock, every_seconds
        self._terminal = self._stream.isatty()
        self._what, self._started, self._first, self._shown = "", 0.0, 0, float("-inf")

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        if what != self._what:
            self._what, self._started, self._first, self._shown = what, now, done, float("-inf")
        pause = 0.1 if self._terminal else self._every
        if done < total and now - self._shown < pause:
            return
        self._shown = now
        shown = f"{amount(done, total)}/{amount(total, total)}"
        self._write(f"{what}: {shown}{self._pace(done, total, now - self._started)}", done, total)

    def _pace(self, done: int, total: int, seconds: float) -> str:
        if done >= total:
            return f", {duration(seconds)}"
        if done <= self._first or seconds <= 0:
            return ""
        rate = (done - self._first) / seconds
        return f", {amount(rate, total)}/s, {duration((total - done) / rate)} left"

    def _write(self, line: str, done: int, total: int) -> None:
        if self._terminal:
            filled = _BAR * done // max(total, 1)
            end = "\n" if done >= total else ""
            self._stream.write(f"\r[{'#' * filled:<{_BAR}}] {line}\x1b[K{end}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
