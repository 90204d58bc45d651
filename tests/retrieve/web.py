"""A small web on loopback for the download tests: pictures, and the ways in which a URL goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from retrieve_or_generate.retrieve.download import DownloadPolicy


@contextmanager
def web(pictures: Mapping[str, bytes]) -> Iterator[tuple[str, DownloadPolicy, list[str]]]:
    """Serve `pictures` by path, and `/redirect`, `/noai`, `/slow`, `/huge`, `/to/PATH` (leads to PATH); anything else is 404.

    A path that ends in `?busy=N` is answered 503 the first N times, and one in `?later=N` 429 with Retry-After 1. Gives the base
    URL, a policy that may reach it, and the paths that were asked for.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path, _, query = self.path.partition("?")
            how, _, times = query.partition("=")
            if how in ("busy", "later") and asked.count(self.path) <= int(times):
                return self.answer(503) if how == "busy" else self.answer(429, **{"Retry-After": "1"})
            if path == "/redirect":
                return self.answer(302, Location="file:///etc/passwd")
            if path.startswith("/to/"):
                return self.answer(302, Location=self.path.removeprefix("/to"))
            if path == "/noai":
                return self.answer(200, b"x", **{"X-Robots-Tag": "max-snippet: 1, noai"})
            if path == "/huge":
                return self.answer(200, b"x" * 200_000)
            if path == "/slow":
                time.sleep(2.5)
                return None
            if path in pictures:
                return self.answer(200, pictures[path], **{"Content-Type": "image/jpeg"})
            return self.answer(404)

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """The test reads `asked` instead."""

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        port = server.server_address[1]
        yield (
            f"http://127.0.0.1:{port}",
            DownloadPolicy(
                threads=4,
                deadline_seconds=1.5,
                retry_seconds=0.05,
                max_bytes=100_000,
                allowed_endpoints=frozenset({("127.0.0.1", port)}),
            ),
            asked,
        )
        server.shutdown()
    thread.join(5)
