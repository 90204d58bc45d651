"""Manners towards hosts: few connections to one at a time, and none to one that asked us to wait."""

from __future__ import annotations

import email.utils
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST_SECONDS = 86_400.0


class Hosts:
    """Shared by the threads of a process; it remembers only hosts in use and hosts that asked to wait."""

    def __init__(self, limit: int):
        self._limit = limit
        self._changed = threading.Condition()
        self._open: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}

    @contextmanager
    def place(self, host: str) -> Iterator[float]:
        """Hold one of the host's places, once there is one; the seconds that took."""
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._open[host] < self._limit)
            self._open[host] += 1
        try:
            yield time.monotonic() - started
        finally:
            with self._changed:
                self._open[host] -= 1
                if not self._open[host]:
                    del self._open[host]
                self._changed.notify_all()

    def ask_to_wait(self, host: str, seconds: float) -> None:
        now = time.monotonic()
        with self._changed:
            self._not_before = {name: when for name, when in self._not_before.items() if when > now}
            self._not_before[host] = now + min(seconds, _LONGEST_SECONDS)

    def wait(self, host: str) -> float:
        """Seconds until the host may be asked again; 0 where it did not ask to wait."""
        return max(0.0, self._not_before.get(host, 0.0) - time.monotonic())

    def shortest_wait(self, hosts: Iterable[str]) -> float:
        """Seconds until the first of `hosts` may be asked."""
        return min((self.wait(host) for host in set(hosts)), default=0.0)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None where it says neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None
