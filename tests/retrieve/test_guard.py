"""The guarded opener: which addresses, hops, headers and sizes it lets through."""

from __future__ import annotations

import _socket
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pytest

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.retrieve import addresses, guard
from retrieve_or_generate.retrieve.addresses import Names, is_global, system_resolver
from retrieve_or_generate.retrieve.guard import DownloadPolicy, NotFetched, Session, fetch, opted_out
from retrieve_or_generate.retrieve.hosts import Hosts

POLICY = DownloadPolicy(deadline_seconds=2.0, max_bytes=10_000, max_redirects=3)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage"


@contextmanager
def serving(
    answer: bytes | Callable[[socket.socket], None], listen_first: bool = True
) -> Iterator[tuple[str, DownloadPolicy, list[bytes]]]:
    """A server that gives every connection the same answer: its URL, a policy that lets it be reached, and what it was asked."""
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                if listen_first:
                    asked.append(connection.recv(65536))
                try:
                    answer(connection) if callable(answer) else connection.sendall(answer)
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{port}", replace(POLICY, allowed_endpoints=frozenset({("127.0.0.1", port)})), asked
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def outcome(url: str, policy: DownloadPolicy | Session) -> str:
    session = policy if isinstance(policy, Session) else Session(policy)
    try:
        return fetch(url, session)[0].decode(errors="replace")
    except NotFetched as error:
        return str(error)


def answering(status: str, *headers: str, body: bytes = b"image") -> bytes:
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *(h.encode() for h in headers), b"", body])


NOT_GLOBAL = (
    "127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 100.64.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.8 192.168.1.1 "
    "198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: ::ffff:8.8.8.8 ::ffff:127.0.0.1 "
    "64:ff9b::7f00:1 fe80::1 fc00::1 ff02::1 2002:7f00:1:: 2001:0:1::1 2001:db8::1 100::1 fec0::1"
)


@pytest.mark.parametrize("address", NOT_GLOBAL.split())
def test_addresses_that_are_not_global(address: str) -> None:
    assert not is_global(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "192.0.1.1", "223.255.255.255", "2606:4700::1111"]
)
def test_addresses_that_are_global(address: str) -> None:
    assert is_global(address)


LOOPBACK_SPELLINGS = (
    "127.0.0.1 localhost LOCALHOST localhost. 2130706433 0x7f000001 0177.0.0.1 017700000001 0x7f.1 127.1 127.0.1 127.8.8.8 "
    "0 0.0.0.0 127.000.000.001 127.0.0.1. １２７.0.0.1 ①②⑦.⓪.⓪.① %31%32%37.0.0.1 [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] "
    "[::ffff:7f00:1] [::127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::] [::1%25lo]"
)


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS.split())
def test_no_spelling_of_loopback_is_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directly, by redirect, and as what a name stands for; counted by the server that would have been reached."""
    monkeypatch.setattr(
        socket, "getaddrinfo", _socket.getaddrinfo
    )  # past the suite's own guard; numbers need no network
    kept_out = ("refused address", "refused bad_url", "failed dns", "failed bad_response")
    with serving(OK) as (url, _, asked):
        port = url.rpartition(":")[2]
        policy = replace(POLICY, ports=(int(port),), resolver=lambda name, _: system_resolver(host.strip("[]"), 0))
        assert outcome(f"http://{host}:{port}/a.jpg", replace(policy, resolver=system_resolver)).startswith(kept_out)
        assert outcome(f"http://pictures.example:{port}/a.jpg", policy).startswith(kept_out)
        with serving(answering("302 Found", f"Location: http://{host}:{port}/a.jpg", body=b"")) as (first, here, _):
            assert outcome(first, replace(here, ports=(int(port),))).startswith(kept_out)
    assert asked == []


def test_one_address_of_many_that_is_not_global_refuses_the_name() -> None:
    policy = replace(POLICY, resolver=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    assert outcome("http://pictures.example/a.jpg", policy) == "refused address: 10.0.0.1 is not global"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([], "failed connection: the name stands for no address"),
        (["no address"], "refused address: no address is not global"),
        (["fe80::1%eth0"], "refused address"),
        (OSError("SERVFAIL"), "failed dns: pictures.example does not resolve"),
        (UnicodeError("label too long"), "failed dns"),
        (TimeoutError(), "failed dns: pictures.example: no answer in time"),
    ],
)
def test_answers_of_a_resolver(answer: list[str] | Exception, told: str) -> None:
    def resolver(host: str, port: int) -> list[str]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert outcome("http://pictures.example/a.jpg", replace(POLICY, resolver=resolver)).startswith(told)


def test_a_look_up_that_never_ends_is_given_up() -> None:
    asked, over = [], threading.Event()

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        over.wait(5)
        return ["8.8.8.8"]

    session, started = Session(replace(POLICY, resolver=resolver, dns_seconds=0.2)), time.monotonic()
    for _ in range(2):
        assert outcome("http://pictures.example/", session) == "failed dns: pictures.example: no answer in time"
    assert time.monotonic() - started < 1.5
    assert asked == ["pictures.example"], "one look-up of a name at a time"
    over.set()


def test_a_name_is_looked_up_once_and_one_that_failed_again() -> None:
    asked = []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        if len(asked) == 1:
            raise OSError("SERVFAIL")
        return ["10.0.0.1"]

    session = Session(replace(POLICY, resolver=resolver))
    told = [outcome("http://pictures.example/", session).partition(":")[0] for _ in range(4)]
    assert told == ["failed dns", *["refused address"] * 3]
    assert len(asked) == 2


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to something else at the second look-up (DNS rebinding) is not looked up a second time."""
    with serving(OK) as (url, policy, asked):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        answers = iter([["127.0.0.1"]])
        policy = replace(policy, resolver=lambda host, port: next(answers))
        connect = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda to, **k: connected(to, address, connect))
        assert outcome(f"http://pictures.example:{address[1]}/a.jpg", policy) == "image"
    assert b"Host: pictures.example:" in asked[0]


def connected(to: tuple[str, int], wanted: tuple[str, int], connect: Callable[..., socket.socket]) -> socket.socket:
    assert to == wanted
    inner = socket.socket()
    inner.connect(to)
    return inner


def test_a_dead_address_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(OK) as (url, policy, _):
        port = int(url.rpartition(":")[2])
        endpoints = policy.allowed_endpoints | {("127.0.0.2", port)}
        policy = replace(policy, allowed_endpoints=endpoints, resolver=lambda host, _: ["127.0.0.2", "127.0.0.1"])
        connect, patience = socket.create_connection, list[float]()

        def slow(to: tuple[str, int], timeout: float) -> socket.socket:
            patience.append(timeout)
            if to[0] == "127.0.0.2":
                raise TimeoutError
            return connect(to, timeout=timeout)

        monkeypatch.setattr(socket, "create_connection", slow)
        assert outcome(f"http://pictures.example:{port}/", policy) == "image"
    assert patience[0] <= policy.deadline_seconds / 2 < patience[1]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("file:///etc/passwd", "refused scheme: file"),
        ("ftp://example.com/a.jpg", "refused scheme: ftp"),
        ("data:image/png;base64,AAAA", "refused scheme: data"),
        ("a.jpg", "refused scheme: none"),
        ("http://user:secret@example.com/", "refused credentials"),
        ("http:///a.jpg", "refused bad_url"),
        ("http://[::1/a.jpg", "refused bad_url"),
        ("http://127.0.0.1:99999/", "refused bad_url"),
    ],
)
def test_urls_that_are_refused_before_any_look_up(url: str, told: str) -> None:
    assert outcome(url, POLICY).startswith(told)


def test_a_port_that_is_not_listed() -> None:
    policy = replace(POLICY, resolver=lambda host, port: ["8.8.8.8"])
    assert outcome("http://pictures.example:22/", policy) == "refused port: 22"


def test_a_blocked_url_is_refused_on_every_hop_before_a_socket_opens() -> None:
    with (
        serving(OK) as (last, policy, asked),
        serving(answering("302 Found", f"Location: {last}/%61.jpg", body=b"")) as (first, first_policy, _),
    ):
        policy = replace(policy, allowed_endpoints=policy.allowed_endpoints | first_policy.allowed_endpoints)
        assert outcome(f"{first}/start", policy) == "image"
        session = Session(policy, Blocklist.of([last.upper().replace("HTTP", "https") + "/a.jpg"]))
        assert outcome(f"{first}/start", session) == "blocked hop: a URL on its way is on the blocklist"
        assert outcome(f"{last}/a.jpg", session).startswith("blocked hop")
    assert len(asked) == 1


def test_a_host_that_asks_to_wait_is_left_alone_meanwhile() -> None:
    for status, header, asks in [
        ("429 Too Many", "Retry-After: 1", True),
        ("503 Busy", "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT", True),
        ("503 Busy", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", False),
        ("503 Busy", "Retry-After: soon", False),
        ("503 Busy", "Retry-After: -1", False),
        ("404 Not Found", "Retry-After: 100", False),
    ]:
        with serving(answering(status, header)) as (url, policy, asked):
            session = Session(policy)
            assert outcome(url, session) == f"failed http_{status[:3]}: 127.0.0.1"
            told = outcome(url, session)
            assert told == (
                "failed rate_limited: 127.0.0.1 asked us to wait" if asks else f"failed http_{status[:3]}: 127.0.0.1"
            )
            assert len(asked) == (1 if asks else 2)


def test_what_a_host_asks_for_is_over_in_time() -> None:
    hosts = Hosts(1)
    hosts.ask_to_wait("slow.example", 0.1)
    assert 0 < hosts.wait("slow.example") <= 0.1
    assert hosts.shortest_wait(["slow.example"]) > 0
    assert hosts.shortest_wait(["slow.example", "other.example"]) == hosts.shortest_wait([]) == 0
    time.sleep(0.11)
    assert hosts.wait("slow.example") == 0


def test_few_connections_to_one_host_at_a_time() -> None:
    hosts, most, lock = Hosts(2), {"now": 0, "ever": 0}, threading.Lock()

    def ask() -> None:
        with hosts.place("one.example"):
            with lock:
                most["now"] += 1
                most["ever"] = max(most["ever"], most["now"])
            time.sleep(0.02)
            with lock:
                most["now"] -= 1

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    with hosts.place("other.example") as waited:
        assert waited < 0.5
    for thread in threads:
        thread.join()
    assert most["ever"] == 2


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (OK, "image"),
        (answering("200 OK"), "image"),
        (answering("200 OK", "Transfer-Encoding: chunked", body=b"3\r\nima\r\n2\r\nge\r\n0\r\n\r\n"), "image"),
        (answering("404 Not Found"), "failed http_404"),
        (answering("206 Partial Content"), "failed http_206"),
        (answering("304 Not Modified"), "failed http_304"),
        (answering("302 Found"), "failed http_302"),
        (answering("302 Found", "Location: file:///etc/passwd"), "refused scheme: file"),
        (answering("302 Found", "Location: //user@x/"), "refused credentials"),
        (answering("302 Found", "Location: http://[/"), "failed bad_response"),
        (answering("302 Found", "Location: /again"), "refused too_many_redirects"),
        (answering("200 OK", "Content-Length: 50"), "failed incomplete: 5 of 50 bytes"),
        (answering("200 OK", "Content-Length: -1"), "failed bad_response"),
        (answering("200 OK", "Content-Length: 10001"), "refused too_large: 10001 bytes announced"),
        (answering("200 OK", body=b"x" * 10_001), "refused too_large"),
        (answering("200 OK", "Transfer-Encoding: chunked", body=b"FFFFFFFFFFFF\r\nima"), "failed bad_response"),
        (answering("200 OK", "Transfer-Encoding: chunked", body=b"nonsense\r\nima"), "failed bad_response"),
        (answering("200 OK", "Content-Encoding: gzip"), "failed encoding: gzip"),
        (answering("200 OK", *(f"X-{i}: {'y' * 900}" for i in range(99)), body=b"x" * 60_000), "refused too_large"),
        (b"garbage\r\n\r\n", "failed bad_response"),
        (b"", "failed bad_response"),
        (answering("200 OK", "X-Robots-Tag: noai"), "refused opt_out: X-Robots-Tag: noai"),
        (answering("404 Not Found", "X-Robots-Tag: noai"), "refused opt_out"),
        (answering("302 Found", "Location: /again", "tdm-reservation: 1"), "refused opt_out: tdm-reservation: 1"),
    ],
)
def test_answers(answer: bytes, told: str) -> None:
    with serving(answer) as (url, policy, _):
        assert outcome(url + "/a b.jpg?x=ü", policy).startswith(told)


def drip(connection: socket.socket, head: bytes) -> None:
    connection.sendall(head)
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_slow_trickle_ends_at_the_total_deadline(head: bytes) -> None:
    with serving(lambda connection: drip(connection, head)) as (url, policy, _):
        started = time.monotonic()
        assert outcome(url, replace(policy, deadline_seconds=0.3)).startswith("failed timeout")
        assert time.monotonic() - started < 1.5


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 4096)


def test_an_endless_body_ends_at_the_cap() -> None:
    with serving(endless) as (url, policy, _):
        assert outcome(url, policy).startswith("refused too_large")


def test_a_closed_port_and_an_unknown_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    policy = replace(POLICY, allowed_endpoints=frozenset({("127.0.0.1", port)}))
    assert outcome(f"http://127.0.0.1:{port}/", policy).startswith("failed connection")
    assert outcome("http://no-such-host.invalid/", policy).startswith("failed dns")


def test_proxies_are_ignored_and_the_agent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(OK) as (url, policy, asked):
        assert outcome(url + "/a.jpg", policy) == "image"
    assert asked[0].startswith(b"GET /a.jpg HTTP/1.1\r\n")
    assert b"User-Agent: rog/" in asked[0]
    assert b"Accept-Encoding: identity" in asked[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of pictures.example that nobody vouches for, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subprocess.run(["openssl", "req", "-x509", *kind, *subject, *files], check=True, capture_output=True)
    return folder / "certificate", folder / "key"


@pytest.mark.parametrize(
    ("host", "trusted", "told"),
    [
        ("pictures.example", True, "image"),
        ("pictures.example", False, "failed tls: CERTIFICATE_VERIFY_FAILED"),
        ("other.example", True, "failed tls: CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_a_certificate_must_be_vouched_for_and_be_the_hosts(
    host: str, trusted: bool, told: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate)
    client = ssl.create_default_context(cafile=str(certificate[0]) if trusted else None)
    monkeypatch.setattr(guard, "_tls", lambda: client)

    def serve(connection: socket.socket) -> None:
        with server.wrap_socket(connection, server_side=True) as secured:
            secured.recv(65536)
            secured.sendall(OK)

    with serving(serve, listen_first=False) as (url, policy, _):
        policy = replace(policy, resolver=lambda name, port: ["127.0.0.1"])
        assert outcome(f"https://{host}:{url.rpartition(':')[2]}/a.jpg", policy) == told


OPT_OUTS = [
    ["noai"],
    ["NOAI"],
    ["noimageai, nofollow"],
    ["nofollow,noindex"],
    ["none"],
    ["all", "noai"],
    ["max-image-preview:large, noai"],
    ["noai, unavailable_after: 25 Jun 2030 15:00:00 PST"],
    ["unavailable_after: Wednesday, 25-Jun-30 15:00:00 PST, noai"],
    ["rog: noai"],
    ["img2dataset: noimageai"],
    ["*: noai"],
    ["otherbot: nofollow", "rog: nofollow, noai"],
    ["otherbot: nofollow, rog: noai"],
]
CONSENTS = [
    [],
    ["all"],
    ["nofollow"],
    ["otherbot: noai"],
    ["otherbot: nofollow, noai"],
    ["max-snippet: 20"],
    ["noaix"],
    [""],
]


@pytest.mark.parametrize(("values", "expected"), [*((v, True) for v in OPT_OUTS), *((v, False) for v in CONSENTS)])
def test_opt_out_headers(values: list[str], expected: bool) -> None:
    headers = Message()
    for value in values:
        headers["x-robots-tag"] = value
    assert bool(opted_out(headers, POLICY.robot_names, POLICY.opt_out_directives)) is expected


def test_names_and_hosts_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_MOST_KEPT", 10)
    names, hosts = Names(lambda host, port: ["192.0.2.1"], 5.0), Hosts(1)
    for number in range(35):
        assert names.addresses(f"h{number}.example", 80, time.monotonic() + 5) == ["192.0.2.1"]
        hosts.ask_to_wait(f"h{number}.example", 0.0)
    assert len(names._asked) <= 10
    assert len(hosts._not_before) < 35
