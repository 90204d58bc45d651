"""A hostile web on loopback: one path a behaviour, each with the outcome that a guarded fetch must come to."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from retrieve_or_generate.pocket.pictures import evaluation_split
from retrieve_or_generate.retrieve.guard import DownloadPolicy

IMAGE = evaluation_split("textures", "val")[0].jpeg
MAX_BYTES, DEADLINE = 50_000, 0.6  # seconds, for those that never end; the others have time, also on a loaded machine
POLICY = DownloadPolicy(deadline_seconds=20, max_bytes=MAX_BYTES, max_redirects=3, retries=0, per_host=16)

Answer = bytes | Callable[[socket.socket, str], None]


@dataclass(frozen=True)
class Behaviour:
    """What the server does with a connection, and status and reason code of what comes of it ("ok": the image)."""

    answer: Answer
    outcome: str


def answer(status: str, *headers: str, body: bytes = IMAGE) -> bytes:
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *(header.encode() for header in headers), b"", body])


def ok(*headers: str, body: bytes = IMAGE) -> bytes:
    return answer("200 OK", *headers, body=body)


def to(location: str, *headers: str) -> bytes:
    return answer("302 Found", f"Location: {location}", *headers, body=b"")


def chunked(*chunks: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    return ok("Transfer-Encoding: chunked", body=body + last)


def drip(head: bytes, piece: bytes = b"x", seconds: float = 0.05) -> Answer:
    def send(connection: socket.socket, base: str) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(seconds)

    return send


def endless(head: bytes, piece: bytes) -> Answer:
    return drip(head, piece, 0.0)


def reset(connection: socket.socket, base: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nxx")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silence(connection: socket.socket, base: str) -> None:
    with suppress(TimeoutError):
        connection.recv(1)


def slow_hop(connection: socket.socket, base: str) -> None:
    time.sleep(DEADLINE / 2)
    connection.sendall(to("/slow_hops"))


def to_base(path: str) -> Answer:
    """A redirect to an absolute URL of this server."""
    return lambda connection, base: connection.sendall(to(base + path))


def _headers(count: int, size: int) -> list[str]:
    return [f"X-{number}: {'y' * size}" for number in range(count)]


LENGTH = f"Content-Length: {len(IMAGE)}"
BEHAVIOURS = {
    # Odd, but fine.
    "plain": Behaviour(ok(LENGTH), "ok"),
    "no_length": Behaviour(ok(), "ok"),
    "old_protocol": Behaviour(b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE, "ok"),
    "no_reason_phrase": Behaviour(b"HTTP/1.1 200\r\n\r\n" + IMAGE, "ok"),
    "lf_only": Behaviour(b"HTTP/1.1 200 OK\nX: y\n\n" + IMAGE, "ok"),
    "chunked": Behaviour(chunked(IMAGE[:99], IMAGE[99:]), "ok"),
    "chunked_with_trailer": Behaviour(chunked(IMAGE, last=b"0\r\nX-Sum: 1\r\n\r\n"), "ok"),
    "chunked_and_length": Behaviour(chunked(IMAGE).replace(b"\r\n", b"\r\nContent-Length: 3\r\n", 1), "ok"),
    "length_twice_the_same": Behaviour(ok(LENGTH, LENGTH), "ok"),
    "more_bytes_than_announced": Behaviour(ok(LENGTH, body=IMAGE + b"<script>"), "ok"),
    "continue_first": Behaviour(b"HTTP/1.1 100 Continue\r\n\r\n" + ok(), "ok"),
    "cookies": Behaviour(ok(*["Set-Cookie: a=b; Domain=.example"] * 20), "ok"),
    "refresh_is_no_redirect": Behaviour(ok("Refresh: 0; url=file:///etc/passwd"), "ok"),
    "content_type_lies": Behaviour(ok("Content-Type: text/html"), "ok"),
    "good_redirect": Behaviour(to("/plain"), "ok"),
    "good_absolute_redirect": Behaviour(to_base("/plain"), "ok"),
    "redirect_with_blanks": Behaviour(to("  /plain#top  "), "ok"),
    "noarchive_is_no_opt_out": Behaviour(ok("X-Robots-Tag: noarchive, nofollow"), "ok"),
    "tdm_allowed": Behaviour(ok("tdm-reservation: 0"), "ok"),
    # Statuses.
    **{
        f"status_{code}": Behaviour(answer(f"{code} Told"), f"failed http_{code}")
        for code in (103, 201, 204, 206, 300, 304, 305, 400, 401, 403, 404, 410, 429, 451, 500, 502, 503, 999)
    },
    "status_99": Behaviour(answer("99 Low"), "failed bad_response"),
    "status_text": Behaviour(answer("OK OK"), "failed bad_response"),
    "found_without_location": Behaviour(answer("302 Found"), "failed http_302"),
    "found_with_empty_location": Behaviour(to(""), "failed http_302"),
    # No HTTP.
    "nothing": Behaviour(b"", "failed bad_response"),
    "garbage": Behaviour(bytes(range(256)) * 4, "failed bad_response"),
    "http_0_9": Behaviour(IMAGE, "failed bad_response"),
    "http_2": Behaviour(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "failed bad_response"),
    "ssh": Behaviour(b"SSH-2.0-OpenSSH_9.6\r\n", "failed bad_response"),
    "reset": Behaviour(reset, "failed connection"),
    "cut_within_headers": Behaviour(b"HTTP/1.1 200 OK\r\nContent-Le", "undecodable empty"),
    # Lengths.
    "fewer_bytes_than_announced": Behaviour(ok(f"Content-Length: {len(IMAGE) + 1}"), "failed incomplete"),
    "length_negative": Behaviour(ok("Content-Length: -1"), "failed bad_response"),
    "length_words": Behaviour(ok("Content-Length: many"), "failed bad_response"),
    "length_digits_of_another_script": Behaviour(ok("Content-Length: \u0665"), "failed bad_response"),
    "length_huge": Behaviour(ok("Content-Length: " + "9" * 30), "refused too_large"),
    "length_just_above": Behaviour(ok(f"Content-Length: {MAX_BYTES + 1}"), "refused too_large"),
    "lengths_differ": Behaviour(ok(LENGTH, "Content-Length: 3"), "failed bad_response"),
    "body_just_above": Behaviour(ok(body=b"x" * (MAX_BYTES + 1)), "refused too_large"),
    "chunk_size_words": Behaviour(ok("Transfer-Encoding: chunked", body=b"xyz\r\nabc"), "failed bad_response"),
    "chunk_size_negative": Behaviour(ok("Transfer-Encoding: chunked", body=b"-5\r\nabcde"), "failed bad_response"),
    "chunk_size_huge": Behaviour(
        ok("Transfer-Encoding: chunked", body=b"FFFFFFFFFFFFFFFF\r\nab"), "failed bad_response"
    ),
    "chunks_without_end": Behaviour(chunked(IMAGE, last=b""), "failed bad_response"),
    "gzip": Behaviour(ok("Content-Encoding: gzip", body=b"\x1f\x8b" + bytes(99)), "failed encoding"),
    "several_encodings": Behaviour(ok("Content-Encoding: br, gzip"), "failed encoding"),
    # Too much.
    "header_line_too_long": Behaviour(ok("X: " + "y" * 70_000), "failed bad_response"),
    "too_many_headers": Behaviour(ok(*_headers(120, 9)), "failed bad_response"),
    "headers_and_body_above_the_cap": Behaviour(ok(*_headers(90, 1150), body=b"x" * MAX_BYTES), "refused too_large"),
    "endless_body": Behaviour(endless(ok(body=b""), b"x" * 4096), "refused too_large"),
    "endless_chunks": Behaviour(
        endless(ok("Transfer-Encoding: chunked", body=b""), b"1000\r\n" + bytes(4096) + b"\r\n"), "refused too_large"
    ),
    "endless_continue": Behaviour(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "refused too_large"),
    # Too slow.
    "silence": Behaviour(silence, "failed timeout"),
    "slow_status": Behaviour(drip(b""), "failed timeout"),
    "slow_header": Behaviour(drip(b"HTTP/1.1 200 OK\r\nX: "), "failed timeout"),
    "slow_body": Behaviour(drip(ok(body=b"")), "failed timeout"),
    "slow_chunks": Behaviour(drip(ok("Transfer-Encoding: chunked", body=b""), b"1\r\nx\r\n"), "failed timeout"),
    "slow_hops": Behaviour(slow_hop, "failed timeout"),
    # Redirects to where nobody may go.
    "loop": Behaviour(to("/loop"), "refused too_many_redirects"),
    "to_file": Behaviour(to("file:///etc/passwd"), "refused scheme"),
    "to_data": Behaviour(to("data:image/png;base64,AAAA"), "refused scheme"),
    "to_ftp": Behaviour(to("ftp://8.8.8.8/a.jpg"), "refused scheme"),
    "to_gopher": Behaviour(to("gopher://8.8.8.8:25/_HELO"), "refused scheme"),
    "to_javascript": Behaviour(to("javascript:alert(1)"), "refused scheme"),
    "to_credentials": Behaviour(to("http://user:secret@8.8.8.8/"), "refused credentials"),
    "to_another_port_here": Behaviour(to("http://127.0.0.1:9/"), "refused address"),
    "to_metadata_service": Behaviour(to("http://169.254.169.254/latest/meta-data/"), "refused address"),
    "to_private": Behaviour(to("//10.0.0.1/a.jpg"), "refused address"),
    "to_mapped": Behaviour(to("http://[::ffff:127.0.0.1]/"), "refused address"),
    "to_nat64": Behaviour(to("http://[64:ff9b::7f00:1]/"), "refused address"),
    "to_mail_port": Behaviour(to("http://8.8.8.8:25/"), "refused port"),
    "to_no_host": Behaviour(to("http://:80/a.jpg"), "refused bad_url"),
    "to_bad_port": Behaviour(to("http://8.8.8.8:99999/"), "refused bad_url"),
    "to_unclosed_bracket": Behaviour(to("http://[::1/"), "failed bad_response"),
    "to_no_such_name": Behaviour(to("http://no-such-host.invalid/a.jpg"), "failed dns"),
    "to_a_label_too_long": Behaviour(to(f"http://{'a' * 70}.example/"), "failed dns"),
    # Sites that opt out.
    "noai": Behaviour(ok("X-Robots-Tag: noai"), "refused opt_out"),
    "noimageai_after_a_value": Behaviour(ok("X-Robots-Tag: max-image-preview:large, noimageai"), "refused opt_out"),
    "none": Behaviour(ok("X-Robots-Tag: none"), "refused opt_out"),
    "noai_in_the_second_header": Behaviour(ok("X-Robots-Tag: all", "x-robots-tag: NOAI"), "refused opt_out"),
    "noai_on_the_redirect_alone": Behaviour(to("/plain", "X-Robots-Tag: noai"), "refused opt_out"),
    "noai_on_an_error": Behaviour(answer("404 Not Found", "X-Robots-Tag: noai"), "refused opt_out"),
    "tdm_reserved": Behaviour(ok("TDM-Reservation: 1"), "refused opt_out"),
    "tdm_reserved_in_the_second_header": Behaviour(ok("tdm-reservation: 0", "tdm-reservation: 1"), "refused opt_out"),
    # Bytes that are no image.
    "html": Behaviour(ok("Content-Type: image/jpeg", body=b"<html>not found</html>"), "undecodable format"),
    "svg": Behaviour(ok(body=b"<svg onload='alert(1)'/>"), "undecodable format"),
    "empty": Behaviour(ok("Content-Length: 0", body=b""), "undecodable empty"),
    "half_an_image": Behaviour(ok(body=IMAGE[: len(IMAGE) // 2]), "undecodable broken"),
    "polyglot": Behaviour(ok(body=b"\xff\xd8\xff" + b"<?php system('id') ?>" * 20), "undecodable broken"),
}


@contextmanager
def hostile_web() -> Iterator[tuple[str, frozenset[tuple[str, int]]]]:
    """The server: its base URL, and the endpoint that a policy must allow."""

    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(5)
            request = connection.recv(65536)
            known = request.startswith(b"GET ")  # who speaks TLS is answered in plain text
            told = BEHAVIOURS[request.split(b" ")[1].decode().strip("/")].answer if known else ok()
            told(connection, base) if callable(told) else connection.sendall(told)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        threading.Thread(target=serve, daemon=True).start()
        yield base, frozenset({("127.0.0.1", port)})
        listener.shutdown(socket.SHUT_RDWR)
