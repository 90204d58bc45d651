"""The same search against a running clip-retrieval service: its `/knn-service`, one query a request.

clip-retrieval's own client bends every query towards "aesthetic 9", drops near copies and hides what its safety models flag, unless
it is told otherwise. Here each of these is off until asked for, so the answer is the plain nearest neighbours. The service's
address is the user's own, loopback included; answers are bounded in bytes and seconds, and nothing in them is fetched or opened.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieve_or_generate import __version__
from retrieve_or_generate.errors import IncompleteError, UsageError, unknown_name
from retrieve_or_generate.pool.parts import Modality
from retrieve_or_generate.retrieve.hosts import retry_after

Neighbour = dict[str, Any]
"""`id` (int, the row), `similarity` (float), `url`, `caption` and `NSFW` (str, or None where the service does not tell)."""

_KNN, _INDEXES = "/knn-service", "/indices-list"
_TOLD = {"url": ("url",), "caption": ("caption", "text", "alt_text"), "NSFW": ("nsfw",)}
_BUSY = (429, 502, 503, 504)
_PIECE = 1 << 16
_MOST = 1e9  # a similarity beyond this, or NaN, is none


@dataclass(frozen=True)
class ServicePolicy:
    """How a service is asked: queries under way at once, patience a request, tries, waits between them, bytes an answer may have.

    `bytes_per_neighbour` leaves room for the picture that clip-retrieval puts into an answer where it finds the file.
    """

    connections: int = 4
    timeout_seconds: float = 300.0
    attempts: int = 5
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 60.0
    bytes_per_neighbour: int = 1 << 16


class _TryAgain(Exception):
    """The service did not answer this time; `wait` is how many seconds it asked for."""

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.wait = wait


def query_service(
    url: str,
    *,
    k: int,
    texts: Sequence[str] | None = None,
    embeddings: np.ndarray | None = None,
    modality: Modality = "image",
    index: str | None = None,
    aesthetic: tuple[int, float] | None = None,
    deduplicate: bool = False,
    safety: bool = False,
    violence: bool = False,
    policy: ServicePolicy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Neighbour]]:
    """The neighbours of each query among the service's `modality` embeddings, best first, ties by row; at most k a query.

    Queries are `texts`, which the service embeds, or `embeddings` (q, d) float32. `url` is the service's address, with or without
    `/knn-service`; `index` one of its indexes by name, needed where it has several. `aesthetic` bends queries towards a rating
    of 0 to 9 with a weight; `deduplicate`, `safety` and `violence` have the service leave rows out (then fewer than k come).
    `progress` is told queries done and queries in all.

    Raises:
        UsageError: the service does not know the index, refuses the query, or is no clip-retrieval.
        IncompleteError: it did not answer, however often it was asked.
    """
    policy = policy or ServicePolicy()
    service = _Service(url, policy)
    asked = _queries(texts, embeddings)
    if k < 1:
        raise UsageError(f"k is at least 1, not {k}")
    shared = {
        "modality": modality,
        "num_images": k,
        "num_result_ids": k,
        "indice_name": _named(index, service_indexes(url, policy), url),
        "use_mclip": False,
        "deduplicate": deduplicate,
        "use_safety_model": safety,
        "use_violence_detector": violence,
        **_bent(aesthetic),
    }
    return _all(service, [shared | query for query in asked], k, progress)


def service_indexes(url: str, policy: ServicePolicy | None = None) -> list[str]:
    """The names of the service's indexes."""
    service = _Service(url, policy or ServicePolicy())
    names = service.ask(_INDEXES, None, 1)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{service.base}{_INDEXES}: lists no indexes; is it a clip-retrieval service?")
    return names


def _named(index: str | None, names: list[str], url: str) -> str:
    if index is None and len(names) > 1:
        raise UsageError(f"{url}: has several indexes ({', '.join(names)}); name one")
    if index is not None and index not in names:
        raise unknown_name(f"index of {url}", index, names)
    return index or names[0]


def _bent(aesthetic: tuple[int, float] | None) -> dict[str, Any]:
    """The service takes absent keys for "no bending"; null would break it."""
    if aesthetic is None:
        return {}
    score, weight = aesthetic
    if score not in range(10) or not math.isfinite(weight):
        raise UsageError(f"aesthetic {aesthetic}: a rating from 0 to 9 and a weight")
    return {"aesthetic_score": int(score), "aesthetic_weight": float(weight)}


def _queries(texts: Sequence[str] | None, embeddings: np.ndarray | None) -> list[dict[str, Any]]:
    if (texts is None) == (embeddings is None):
        raise ValueError("give either texts or embeddings")
    if texts is not None:
        if not all(text.strip() for text in texts):
            raise UsageError("an empty text is no query")
        return [{"text": text} for text in texts]
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"embeddings are a (q, d) array of finite numbers, not one of shape {vectors.shape}")
    return [{"embedding_input": vector} for vector in vectors.tolist()]


def _all(
    service: _Service, questions: list[dict[str, Any]], k: int, progress: Callable[[int, int], None] | None
) -> list[list[Neighbour]]:
    """The answers in the order of the questions; the first failure ends all that is left."""

    def ask(question: dict[str, Any]) -> list[Neighbour]:
        return _neighbours(service.ask(_KNN, question, k), k, service.base)

    with ThreadPoolExecutor(service.policy.connections) as pool:
        waiting = [pool.submit(ask, question) for question in questions]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                if progress:
                    progress(done, len(questions))
        except BaseException:
            service.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in waiting]


class _Service:
    """Asks one service, and asks again while it is busy or away."""

    def __init__(self, url: str, policy: ServicePolicy):
        try:
            parts = urllib.parse.urlsplit(url.strip())
            self.host, self.port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UsageError(f"service {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not self.host or parts.username is not None:
            raise UsageError(f"service {url!r}: give an address such as http://127.0.0.1:1234")
        self.secure, self.policy = parts.scheme == "https", policy
        self.path = parts.path.rstrip("/").removesuffix(_KNN)
        self.base = urllib.parse.urlunsplit((parts.scheme, parts.netloc, self.path, "", ""))
        self._sockets: set[socket.socket] = set()
        self._stopped = threading.Event()

    def ask(self, path: str, question: dict[str, Any] | None, k: int) -> Any:
        """The decoded answer to a GET, or to a POST of `question`."""
        for attempt in range(1, self.policy.attempts + 1):
            try:
                return self._once(path, question, _PIECE + k * self.policy.bytes_per_neighbour)
            except _TryAgain as problem:
                if attempt == self.policy.attempts or self._stopped.is_set():
                    raise IncompleteError(
                        f"{self.base}{path}: {problem}, asked {attempt} times; see that the service runs and ask again"
                    ) from None
                pause = max(problem.wait, self.policy.first_wait_seconds * 2 ** (attempt - 1))
                self._stopped.wait(min(pause, self.policy.longest_wait_seconds))
        raise AssertionError("attempts is at least 1")

    def _once(self, path: str, question: dict[str, Any] | None, max_bytes: int) -> Any:
        try:
            status, headers, body = self._exchange(path, question, max_bytes)
        except ssl.SSLError as error:
            raise UsageError(f"{self.base}: no secure connection ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"no answer ({str(error) or type(error).__name__})") from None
        if status in _BUSY:
            raise _TryAgain(f"it answers {status}", retry_after(headers.get("Retry-After")) or 0.0)
        if status != 200:
            hint = "; an index without embeddings of that modality does this" if status == 500 else ""
            raise UsageError(f"{self.base}{path}: answers {status}: {_shown(body)}{hint}")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise UsageError(
                f"{self.base}{path}: answers {_shown(body)}, no JSON; is it a clip-retrieval service?"
            ) from None

    def _exchange(
        self, path: str, question: dict[str, Any] | None, max_bytes: int
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body. A watch ends the connection at the deadline, however slowly its bytes trickle."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.policy.timeout_seconds)
        connection.connect()
        sock, late = connection.sock, threading.Event()
        watch = threading.Timer(self.policy.timeout_seconds, _end, (sock, late))
        watch.start()
        self._sockets.add(sock)
        if self._stopped.is_set():
            _end(sock)
        try:
            told = {"Accept": "application/json", "User-Agent": f"rog/{__version__}", "Connection": "close"}
            if question is None:
                connection.request("GET", self.path + path, headers=told)
            else:
                told["Content-Type"] = "application/json"
                connection.request("POST", self.path + path, json.dumps(question).encode(), told)
            with connection.getresponse() as response:
                answer = response.status, response.headers, self._body(response, path, max_bytes)
            if late.is_set():  # a body of unknown length that was cut off looks whole
                raise TimeoutError
            return answer
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError(f"not done after {self.policy.timeout_seconds:g} s") from error
            raise
        finally:
            watch.cancel()
            self._sockets.discard(sock)
            connection.close()

    def _body(self, response: http.client.HTTPResponse, path: str, max_bytes: int) -> bytes:
        body = bytearray()
        while piece := response.read(_PIECE):
            body += piece
            if len(body) > max_bytes:
                raise UsageError(
                    f"{self.base}{path}: answers with more than {max_bytes} bytes; "
                    "leave image_path out of the service's columns_to_return, or ask for a smaller k"
                )
        if response.length:
            raise http.client.IncompleteRead(bytes(body), response.length)
        return bytes(body)

    def stop(self) -> None:
        """End what is under way, and ask nothing again."""
        self._stopped.set()
        for sock in list(self._sockets):
            _end(sock)


def _end(sock: socket.socket, late: threading.Event | None = None) -> None:
    if late:
        late.set()
    with suppress(OSError):  # it ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _shown(body: bytes) -> str:
    text = " ".join(body[:500].decode(errors="replace").split())
    return ascii(text[:120]) if text else "nothing"


def _neighbours(answer: Any, k: int, base: str) -> list[Neighbour]:
    """The rows of one answer, checked, best first."""
    if not isinstance(answer, list) or len(answer) > k or not all(isinstance(row, dict) for row in answer):
        raise UsageError(f"{base}{_KNN}: answers {_shown(json.dumps(answer).encode())}, no list of at most {k} rows")
    rows = [_neighbour(row, base) for row in answer]
    if len({row["id"] for row in rows}) != len(rows):
        raise UsageError(f"{base}{_KNN}: answers with one row twice")
    return sorted(rows, key=lambda row: (-row["similarity"], row["id"]))


def _neighbour(row: dict[str, Any], base: str) -> Neighbour:
    number, similarity = row.get("id"), row.get("similarity")
    whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63
    real = isinstance(similarity, int | float) and not isinstance(similarity, bool) and abs(similarity) < _MOST
    if not (whole and real):
        raise UsageError(f"{base}{_KNN}: answers a row with id {number!r} and similarity {similarity!r}")
    lower = {str(name).lower(): value for name, value in row.items()}
    told = {ours: next((lower[name] for name in names if name in lower), None) for ours, names in _TOLD.items()}
    texts = {name: value if isinstance(value, str) else None for name, value in told.items()}
    return {"id": number, "similarity": float(similarity), **texts}  # type: ignore[arg-type]
