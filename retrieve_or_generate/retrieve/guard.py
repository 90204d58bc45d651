"""Fetches one URL from a hostile web: the opener that img2dataset downloads through.

Every hop, redirects included, must be http or https without credentials, on a known port and not on the blocklist, and all
addresses that its host name resolves to must be globally routable; the connection then goes to the address that was checked.
Bytes and seconds are capped in total, look-ups, headers and slow trickles included. A site that opts out on any hop is obeyed, and
so is one that asks us to wait. Proxies and cookies are unknown here.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
import time
import urllib.parse
import urllib.request
import urllib.response
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from functools import cache
from typing import Any, Literal

from retrieve_or_generate import __version__
from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.retrieve.addresses import Names, Resolver, is_global, system_resolver
from retrieve_or_generate.retrieve.hosts import Hosts, retry_after

Address = tuple[str, int]
Status = Literal["failed", "refused", "blocked"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 503)
_VALUED_DIRECTIVES = ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")
_ROBOT_NAME = re.compile(r"\*|[a-z][a-z0-9_./-]*")
_HEADER_BYTES = 100_000
_PIECE = 1 << 16


@dataclass(frozen=True)
class DownloadPolicy:
    """How a download goes about it, and how far it may reach; which images are used is the experiment's `DownloadSettings`.

    Seconds are of one URL, all hops together; `dns_seconds` of one look-up. `per_host` connections of one process are open to a
    host at most. What might go better another time is tried `retries` times more, after `retry_seconds`, then twice that, … or
    when a host's Retry-After is over, as long as one part of the download waits no more than `most_wait_seconds`.
    `allowed_endpoints` are (address, port) pairs reachable although not global, and `resolver` looks names up: for tests.
    """

    threads: int = 16
    per_host: int = 4
    deadline_seconds: float = 20.0
    dns_seconds: float = 5.0
    retries: int = 1
    retry_seconds: float = 1.0
    most_wait_seconds: float = 60.0
    max_bytes: int = 20_000_000
    max_redirects: int = 5
    ports: tuple[int, ...] = (80, 443)
    allowed_endpoints: frozenset[Address] = frozenset()
    resolver: Resolver = system_resolver
    user_agent: str = f"rog/{__version__} (retrieve-or-generate; research download of image-text pairs)"
    robot_names: tuple[str, ...] = ("rog", "retrieve-or-generate", "img2dataset")
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none", "noml")


class Session:
    """What the fetches of one process share: the policy, the blocklist, names looked up, and places at hosts."""

    def __init__(self, policy: DownloadPolicy, blocklist: Blocklist | None = None):
        self.policy, self.blocklist = policy, blocklist or Blocklist()
        self.names, self.hosts = Names(policy.resolver, policy.dns_seconds), Hosts(policy.per_host)


class NotFetched(Exception):
    """No image came of a URL. The text is a status, a reason code and what it was about: "refused opt_out: noai"."""

    status: Status = "failed"

    def __init__(self, reason: str, detail: object = ""):
        told = "".join(letter if letter.isprintable() else "?" for letter in str(detail)[:200])
        super().__init__(f"{self.status} {reason}: {told}")


class Failed(NotFetched):
    """It could not be fetched; another time it might."""


class Refused(NotFetched):
    """We will not fetch it: forbidden by the policy or by the site."""

    status = "refused"


class Blocked(NotFetched):
    """We must not fetch it: it is on the blocklist."""

    status = "blocked"


class GuardedOpener(urllib.request.OpenerDirector):
    """What `urllib.request.urlopen` calls once this is installed. The answer is read whole before it is returned.

    `done` is called after every URL, from whichever thread.
    """

    def __init__(self, session: Session, done: Callable[[], None] = lambda: None):
        super().__init__()
        self.session, self.done = session, done

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> urllib.response.addinfourl:
        """A response with status 200 and a complete body. Raises `Blocked`, `Refused` or `Failed`."""
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        try:
            body, headers, final = fetch(url, self.session)
        finally:
            self.done()
        return urllib.response.addinfourl(io.BytesIO(body), headers, final, 200)


def fetch(url: str, session: Session) -> tuple[bytes, Message, str]:
    """Body, headers and final URL. Raises `Blocked`, `Refused` or `Failed` with a reason code and what it was about."""
    policy = session.policy
    deadline = time.monotonic() + policy.deadline_seconds
    try:
        for _ in range(policy.max_redirects + 1):
            parts, port = check_url(url)
            if session.blocklist.blocks(url=url):
                raise Blocked("hop", "a URL on its way is on the blocklist")
            with session.hosts.place(parts.hostname or "") as waited:
                deadline += waited
                target, body, headers = _hop(parts, port, session, deadline)
            if target is None:
                return body, headers, url
            url = urllib.parse.urljoin(url, target)
        raise Refused("too_many_redirects", policy.max_redirects)
    except TimeoutError:
        raise Failed("timeout", f"not done after {policy.deadline_seconds:g} s") from None
    except ssl.SSLError as error:
        raise Failed("tls", error.reason) from None
    except http.client.HTTPException as error:
        raise Failed("bad_response", type(error).__name__) from None
    except OSError as error:
        raise Failed("connection", error) from None
    except ValueError as error:  # a Location or a host that cannot be parsed or encoded
        raise Failed("bad_response", error) from None


def _hop(
    parts: urllib.parse.SplitResult, port: int, session: Session, deadline: float
) -> tuple[str | None, bytes, Message]:
    """Where it leads to, or None with the body; and the headers."""
    policy, host = session.policy, parts.hostname or ""
    if session.hosts.wait(host):
        raise Failed("rate_limited", f"{host} asked us to wait")
    inner = _connect(_checked_addresses(host, port, session, deadline), deadline)
    try:
        if parts.scheme == "https":
            inner = _tls().wrap_socket(inner, server_hostname=host)
        response = _asked(parts, port, _CappedSocket(inner, deadline, policy.max_bytes + _HEADER_BYTES), policy)
        opt_out = opted_out(response.headers, policy.robot_names, policy.opt_out_directives)
        if opt_out:
            raise Refused("opt_out", opt_out)
        if response.status in _REDIRECTS and response.headers["Location"]:
            return response.headers["Location"].strip(), b"", response.headers
        if response.status in _BUSY and (seconds := retry_after(response.headers["Retry-After"])) is not None:
            session.hosts.ask_to_wait(host, seconds)
        if response.status != 200:
            raise Failed(f"http_{response.status}", host)
        return None, _body(response, policy.max_bytes), response.headers
    finally:
        inner.close()


def _asked(
    parts: urllib.parse.SplitResult, port: int, capped: _CappedSocket, policy: DownloadPolicy
) -> http.client.HTTPResponse:
    """The answer to one GET, its headers read."""
    host = parts.hostname or ""
    connection = http.client.HTTPConnection(f"[{host}]" if ":" in host else host, port)
    connection.default_port = _DEFAULT_PORTS[parts.scheme]
    connection.sock = capped
    headers = {
        "User-Agent": policy.user_agent,
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    connection.request("GET", _target(parts), headers=headers)
    return connection.getresponse()


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _target(parts: urllib.parse.SplitResult) -> str:
    """For the request line: ASCII without blanks, what is escaped already left alone."""
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return urllib.parse.quote(target, safe="/?&=%:;@+$,!~*'()[]#|\\^`{}<>\"")


def check_url(url: str) -> tuple[urllib.parse.SplitResult, int]:
    """Its parts and port. Raises `Refused` for what we would not even look up."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise Refused("bad_url", error) from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise Refused("scheme", parts.scheme or "none")
    if parts.username is not None or parts.password is not None:
        raise Refused("credentials", "a user or password stands in the URL")
    if not parts.hostname:
        raise Refused("bad_url", "no host")
    return parts, port


def _checked_addresses(host: str, port: int, session: Session, deadline: float) -> list[Address]:
    """The addresses of `host`, if every one of them may be reached."""
    policy = session.policy
    try:
        found = session.names.addresses(host, port, deadline)
    except TimeoutError:
        raise Failed("dns", f"{host}: no answer in time") from None
    except (OSError, UnicodeError):
        raise Failed("dns", f"{host} does not resolve") from None
    addresses = [(address, port) for address in dict.fromkeys(found)]
    for address in addresses:
        if address in policy.allowed_endpoints:
            continue
        if not is_global(address[0]):
            raise Refused("address", f"{address[0]} is not global")
        if port not in policy.ports:
            raise Refused("port", port)
    return addresses


def _connect(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """A socket to the first of the checked addresses that answers; each has its share of the time that is left."""
    problem = OSError("the name stands for no address")
    for tried, address in enumerate(addresses):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            return socket.create_connection(address, timeout=left / (len(addresses) - tried))
        except OSError as error:
            problem = error
    raise problem


def opted_out(headers: Message, robot_names: Sequence[str], directives: Sequence[str]) -> str:
    """The header that keeps us out, or "". A directive may be scoped to a robot by name ("otherbot: noai")."""
    if any(value.strip() == "1" for value in headers.get_all("tdm-reservation") or []):
        return "tdm-reservation: 1"
    for value in headers.get_all("X-Robots-Tag") or []:
        ours = True
        for part in value.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _VALUED_DIRECTIVES and _ROBOT_NAME.fullmatch(name):
                ours, name = name in (*robot_names, "*"), rest.partition(":")[0].strip()
            if ours and name in directives:
                return f"X-Robots-Tag: {name}"
    return ""


class _CappedSocket:
    """A connected socket whose reads end at a total deadline and a total size, however slowly the bytes come."""

    def __init__(self, inner: socket.socket, deadline: float, max_bytes: int):
        self._inner, self._deadline, self._left = inner, deadline, max_bytes

    def _patience(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._inner.settimeout(left)

    def sendall(self, data: bytes) -> None:
        self._patience()
        self._inner.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._receive))

    def _receive(self, buffer: memoryview) -> int:
        self._patience()
        count = self._inner.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise Refused("too_large", "more bytes than the cap")
        return count

    def close(self) -> None:
        """The connection that this belongs to closes the socket itself."""


class _Reader(io.RawIOBase):
    def __init__(self, receive: Callable[[memoryview], int]):
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._receive(memoryview(buffer))


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    encoding, lengths = response.headers.get("Content-Encoding", "identity"), response.headers.get_all("Content-Length")
    declared = ", ".join(dict.fromkeys(lengths)) if lengths else None
    if encoding.strip().lower() != "identity":
        raise Failed("encoding", f"{encoding}, though none was asked for")
    if declared is not None and not (declared.isascii() and declared.isdigit()):
        raise Failed("bad_response", f"Content-Length {declared}")
    if declared is not None and int(declared) > max_bytes:
        raise Refused("too_large", f"{declared} bytes announced")
    body = bytearray()
    while piece := response.read(_PIECE):
        body += piece
        if len(body) > max_bytes:
            raise Refused("too_large", f"more than {max_bytes} bytes")
    if declared is not None and not response.chunked and len(body) != int(declared):
        raise Failed("incomplete", f"{len(body)} of {declared} bytes")
    return bytes(body)
