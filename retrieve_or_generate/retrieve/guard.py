"""Fetches one URL from a hostile web: the opener that img2dataset downloads through.

Every hop, redirects included, must be http or https without credentials, on a known port, and all addresses that its host name
resolves to must be globally routable; the connection then goes to the address that was checked. Bytes and seconds are capped
in total, headers and slow trickles included. A site that opts out on any hop is obeyed. Proxies and cookies are unknown here.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
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

Address = tuple[str, int]
Status = Literal["ok", "failed", "refused"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_VALUED_DIRECTIVES = ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")
_ROBOT_NAME = re.compile(r"\*|[a-z][a-z0-9_./-]*")
_HEADER_BYTES = 100_000
_PIECE = 1 << 16

# IANA's special-purpose registries, 2025: what is not globally reachable. The standard library's own table differs by version.
_NOT_GLOBAL_4 = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4",
    "240.0.0.0/4",
)  # fmt: skip
_GLOBAL_6, _NOT_GLOBAL_6 = "2000::/3", ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")


@dataclass(frozen=True)
class DownloadPolicy:
    """What a download may do. `allowed_endpoints` are (address, port) pairs reachable although not global: for tests."""

    threads: int = 16
    deadline_seconds: float = 20.0
    max_bytes: int = 20_000_000
    max_redirects: int = 5
    ports: tuple[int, ...] = (80, 443)
    allowed_endpoints: frozenset[Address] = frozenset()
    user_agent: str = f"rog/{__version__} (retrieve-or-generate; research download of image-text pairs)"
    robot_names: tuple[str, ...] = ("rog", "retrieve-or-generate", "img2dataset")
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none", "noml")


class NotFetched(Exception):
    """No image came of a URL. The text is a status, a reason code and what it was about: "refused opt_out: noai"."""

    status: Status = "failed"

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{self.status} {reason}: {str(detail)[:200]}")


class Failed(NotFetched):
    """It could not be fetched; another time it might."""


class Refused(NotFetched):
    """We will not fetch it: forbidden by the policy or by the site."""

    status = "refused"


class GuardedOpener(urllib.request.OpenerDirector):
    """What `urllib.request.urlopen` calls once this is installed. The answer is read whole before it is returned."""

    def __init__(self, policy: DownloadPolicy):
        super().__init__()
        self.policy = policy

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> urllib.response.addinfourl:
        """A response with status 200 and a complete body. Raises `Refused` or `Failed`."""
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        body, headers, final = fetch(url, self.policy)
        return urllib.response.addinfourl(io.BytesIO(body), headers, final, 200)


def fetch(url: str, policy: DownloadPolicy) -> tuple[bytes, Message, str]:
    """Body, headers and final URL. Raises `Refused` or `Failed` with a reason code and what it was about."""
    deadline = time.monotonic() + policy.deadline_seconds
    try:
        for _ in range(policy.max_redirects + 1):
            target, body, headers = _hop(url, policy, deadline)
            if target is None:
                return body, headers, url
            url = target
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


def _hop(url: str, policy: DownloadPolicy, deadline: float) -> tuple[str | None, bytes, Message]:
    """Where it leads to, or None with the body; and the headers."""
    parts, port = _checked_url(url)
    host = parts.hostname or ""
    inner = _connect(_checked_addresses(host, port, policy), deadline)
    try:
        if parts.scheme == "https":
            inner = _tls().wrap_socket(inner, server_hostname=host)
        connection = http.client.HTTPConnection(f"[{host}]" if ":" in host else host, port)
        connection.default_port = _DEFAULT_PORTS[parts.scheme]
        connection.sock = _CappedSocket(inner, deadline, policy.max_bytes + _HEADER_BYTES)
        headers = {
            "User-Agent": policy.user_agent,
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", _target(parts), headers=headers)
        response = connection.getresponse()
        opt_out = opted_out(response.headers, policy.robot_names, policy.opt_out_directives)
        if opt_out:
            raise Refused("opt_out", opt_out)
        if response.status in _REDIRECTS and response.headers["Location"]:
            return urllib.parse.urljoin(url, response.headers["Location"].strip()), b"", response.headers
        if response.status != 200:
            raise Failed(f"http_{response.status}", host)
        return None, _body(response, policy.max_bytes), response.headers
    finally:
        inner.close()


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _target(parts: urllib.parse.SplitResult) -> str:
    """For the request line: ASCII without blanks, what is escaped already left alone."""
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return urllib.parse.quote(target, safe="/?&=%:;@+$,!~*'()[]#|\\^`{}<>\"")


def _checked_url(url: str) -> tuple[urllib.parse.SplitResult, int]:
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


def _checked_addresses(host: str, port: int, policy: DownloadPolicy) -> list[Address]:
    """The addresses of `host`, if every one of them may be reached."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Failed("dns", f"{host} does not resolve") from None
    addresses = [(str(entry[4][0]), port) for entry in found]
    for address in addresses:
        if address in policy.allowed_endpoints:
            continue
        if not is_global(address[0]):
            raise Refused("address", f"{address[0]} is not global")
        if port not in policy.ports:
            raise Refused("port", port)
    return addresses


def is_global(address: str) -> bool:
    """Whether an IP address is globally routable unicast. What wraps an IPv4 address (mapped, 6to4, Teredo, NAT64) is not."""
    ip = ipaddress.ip_address(address)
    if ip.version == 4:
        return not any(ip in ipaddress.ip_network(network) for network in _NOT_GLOBAL_4)
    return ip in ipaddress.ip_network(_GLOBAL_6) and not any(ip in ipaddress.ip_network(n) for n in _NOT_GLOBAL_6)


def _connect(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """A socket to the first of the checked addresses that answers."""
    problem: OSError = TimeoutError()
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            return socket.create_connection(address, timeout=left)
        except OSError as error:
            problem = error
    raise problem


def opted_out(headers: Message, robot_names: Sequence[str], directives: Sequence[str]) -> str:
    """The header that keeps us out, or "". A directive may be scoped to a robot by name ("otherbot: noai")."""
    if str(headers.get("tdm-reservation", "")).strip() == "1":
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
    encoding, declared = response.headers.get("Content-Encoding", "identity"), response.headers.get("Content-Length")
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
