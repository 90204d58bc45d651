"""Which addresses may be reached, and host names looked up within a time."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache

Resolver = Callable[[str, int], Sequence[str]]
"""Host name and port to the addresses it stands for; raises `OSError` where there are none."""

# IANA's special-purpose registries, 2025: what is not globally reachable. The standard library's own table differs by version.
_NOT_GLOBAL_4 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4",
        "240.0.0.0/4",
    )
)  # fmt: skip
_GLOBAL_6 = ipaddress.ip_network("2000::/3")
_NOT_GLOBAL_6 = tuple(ipaddress.ip_network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))

_KEPT_SECONDS = 300.0  # an answer is asked for again after this; it is checked every time that it is used
_MOST_KEPT = 10_000
_AT_ONCE = 64


def system_resolver(host: str, port: int) -> list[str]:
    """The system's own look-up, every address family."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@lru_cache(maxsize=4096)
def is_global(address: str) -> bool:
    """Whether an IP address is globally routable unicast. What wraps an IPv4 address (mapped, 6to4, Teredo, NAT64) is not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 4:
        return not any(ip in network for network in _NOT_GLOBAL_4)
    return ip in _GLOBAL_6 and not any(ip in network for network in _NOT_GLOBAL_6)


class Names:
    """Look-ups, each in a thread of its own, because the system's cannot be ended; who waits for one waits so long at most.

    Equal look-ups under way are one, and answers are kept for a while. A name that failed is asked for again.
    """

    def __init__(self, resolver: Resolver, seconds: float):
        self._resolver, self._seconds = resolver, seconds
        self._lock, self._room = threading.Lock(), threading.BoundedSemaphore(_AT_ONCE)
        self._asked: dict[tuple[str, int], tuple[float, Future[list[str]]]] = {}

    def addresses(self, host: str, port: int, deadline: float) -> list[str]:
        """All addresses of `host`. Raises `TimeoutError`, or `OSError` or `UnicodeError` where the look-up fails."""
        return self._look_up(host, port).result(max(0.0, min(self._seconds, deadline - time.monotonic())))

    def _look_up(self, host: str, port: int) -> Future[list[str]]:
        now = time.monotonic()
        with self._lock:
            when, answer = self._asked.get((host, port), (now, None))
            if answer is None or (answer.done() and (now - when > _KEPT_SECONDS or answer.exception() is not None)):
                if len(self._asked) >= _MOST_KEPT:
                    self._asked.clear()
                answer = Future()
                self._asked[host, port] = now, answer
                threading.Thread(target=self._answer, args=(answer, host, port), daemon=True).start()
        return answer

    def _answer(self, answer: Future[list[str]], host: str, port: int) -> None:
        with self._room:
            try:
                answer.set_result(list(self._resolver(host, port)))
            except Exception as error:
                answer.set_exception(error)
