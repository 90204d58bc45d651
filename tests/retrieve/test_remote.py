"""Queries to a clip-retrieval service: a small one on loopback that speaks its protocol, and the ways in which one goes wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from retrieve_or_generate.errors import IncompleteError, UsageError
from retrieve_or_generate.retrieve.remote import ServicePolicy, query_service, service_indexes

QUICK = ServicePolicy(timeout_seconds=5.0, first_wait_seconds=0.01, attempts=3)
ROWS = np.eye(6, 4, dtype=np.float32) + 0.1


@dataclass
class Service:
    """What a test may change of the service; `asked` is every question it was sent."""

    indexes: Any = field(default_factory=lambda: ["pets"])
    asked: list[dict[str, Any]] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], Any] | None = None  # in place of the neighbours; bytes go out as they are
    status: Callable[[int], tuple[int, dict[str, str]]] = lambda _: (200, {})
    calls: int = 0
    url: str = ""


def neighbours(question: dict[str, Any]) -> list[dict[str, Any]]:
    """As clip-retrieval answers; the aesthetic bend is told apart by its score."""
    query = np.array(question.get("embedding_input") or [len(question["text"]), 0, 0, 0], np.float32)
    similarity = ROWS @ query + question.get("aesthetic_score", 0)
    best = np.argsort(-similarity, kind="stable")[: question["num_result_ids"]]
    return [
        {"URL": f"http://pets/{row}.jpg", "TEXT": f"pet {row}", "id": int(row), "similarity": float(similarity[row])}
        for row in best
    ]


@contextmanager
def serving(service: Service) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {}, service.indexes if self.path == "/deep/indices-list" else None)

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.asked.append(question)
            service.calls += 1
            status, headers = service.status(service.calls)
            self.send(status, headers, (service.answer or neighbours)(question))

        def send(self, status: int, headers: dict[str, str], value: Any) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, text)
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
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/deep"
        server.shutdown()
    thread.join(5)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    with serving(made) as made.url:
        yield made


def test_plain_neighbours_in_the_order_of_the_queries(service: Service) -> None:
    queries = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    told: list[tuple[int, int]] = []
    found = query_service(
        service.url, embeddings=queries, k=3, policy=QUICK, progress=lambda done, total: told.append((done, total))
    )
    exact = queries @ ROWS.T
    for query, rows in enumerate(found):
        ids = [row["id"] for row in rows]
        assert ids == np.lexsort((np.arange(6), -exact[query]))[:3].tolist()
        assert [row["similarity"] for row in rows] == pytest.approx(exact[query][ids], rel=1e-5)
    assert found[0][0]["url"] == f"http://pets/{found[0][0]['id']}.jpg"
    assert found[0][0]["caption"] == f"pet {found[0][0]['id']}"
    assert found[0][0]["NSFW"] is None
    assert told == [(n, 20) for n in range(1, 21)]
    sent = np.array([question["embedding_input"] for question in service.asked], np.float32)
    assert {row.tobytes() for row in sent} == {row.tobytes() for row in queries}, "no bit of a query is lost"


def test_nothing_hidden_is_on_unless_it_is_asked_for(service: Service) -> None:
    query_service(service.url + "/knn-service/", texts=["a cat"], k=5, modality="text", index="pets", policy=QUICK)
    assert service.asked == [
        {
            "text": "a cat",
            "modality": "text",
            "num_images": 5,
            "num_result_ids": 5,
            "indice_name": "pets",
            "use_mclip": False,
            "deduplicate": False,
            "use_safety_model": False,
            "use_violence_detector": False,
        }
    ]
    query_service(
        service.url, texts=["cat"], k=2, aesthetic=(9, 0.5), deduplicate=True, safety=True, violence=True, policy=QUICK
    )
    asked = service.asked[-1]
    assert (asked["aesthetic_score"], asked["aesthetic_weight"]) == (9, 0.5)
    assert asked["deduplicate"]
    assert asked["use_safety_model"]
    assert asked["use_violence_detector"]


def test_equal_similarities_are_ordered_by_row(service: Service) -> None:
    service.answer = lambda _: [{"id": row, "similarity": 0.5} for row in (4, 1, 3)]
    assert [row["id"] for row in query_service(service.url, texts=["x"], k=3, policy=QUICK)[0]] == [1, 3, 4]


def test_no_queries_are_no_questions(service: Service) -> None:
    assert query_service(service.url, texts=[], k=3, policy=QUICK) == []
    assert service.asked == []


def test_the_index_is_named_where_there_are_several(service: Service) -> None:
    service.indexes = ["pets", "cars"]
    assert service_indexes(service.url, QUICK) == ["pets", "cars"]
    with pytest.raises(UsageError, match=r"several indexes \(pets, cars\); name one"):
        query_service(service.url, texts=["x"], k=1, policy=QUICK)
    with pytest.raises(UsageError, match=r"unknown index .*'pet'; did you mean 'pets'\?"):
        query_service(service.url, texts=["x"], k=1, index="pet", policy=QUICK)
    assert service.asked == []


def test_a_busy_service_is_asked_again(service: Service) -> None:
    service.status = lambda call: (503, {"Retry-After": "0"}) if call < 3 else (200, {})
    assert len(query_service(service.url, texts=["x"], k=2, policy=QUICK)[0]) == 2
    assert service.calls == 3


def test_a_service_that_stays_busy_can_be_asked_another_time(service: Service) -> None:
    service.status = lambda call: (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    with pytest.raises(IncompleteError, match="it answers 503, asked 3 times"):
        query_service(service.url, texts=["x"], k=2, policy=QUICK)


def test_a_service_that_is_away(service: Service) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        IncompleteError, match=r"no answer .*Connection refused.*asked 3 times; see that the service runs"
    ):
        query_service(url, texts=["x"], k=2, policy=QUICK)


def test_the_first_failure_ends_the_others(service: Service) -> None:
    def slow_then_bad(question: dict[str, Any]) -> Any:
        if question["text"] != "bad":
            time.sleep(3)
        return "no list" if question["text"] == "bad" else []

    service.answer = slow_then_bad
    started = time.monotonic()
    with pytest.raises(UsageError, match="no list of at most 2 rows"):
        query_service(service.url, texts=["slow", "slow", "bad", *["slow"] * 20], k=2, policy=QUICK)
    assert time.monotonic() - started < 2.5


BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "html": (b"<html>hello</html>", "answers '<html>hello</html>', no JSON; is it a clip-retrieval service"),
    "empty": (b"", "answers nothing, no JSON"),
    "half": (b'[{"id": 1, "simi', "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "control": (b"\x1b[2J", r"answers '\\x1b\[2J'"),
    "mapping": ({"message": "Internal Server Error"}, "no list of at most 2 rows"),
    "more": ([{"id": n, "similarity": 0.1} for n in range(3)], "no list of at most 2 rows"),
    "numbers": ([1, 2], "no list of at most 2 rows"),
    "twice": ([{"id": 1, "similarity": 0.1}] * 2, "one row twice"),
    "no_id": ([{"similarity": 0.1}], "a row with id None"),
    "text_id": ([{"id": "1", "similarity": 0.1}], "a row with id '1'"),
    "true_id": ([{"id": True, "similarity": 0.1}], "a row with id True"),
    "minus": ([{"id": -1, "similarity": 0.1}], "a row with id -1"),
    "huge_id": ([{"id": 2**64, "similarity": 0.1}], "a row with id 1844"),
    "digits": (b'[{"id": ' + b"9" * 9000 + b', "similarity": 0}]', "no JSON"),
    "nan": (b'[{"id": 1, "similarity": NaN}]', "similarity nan"),
    "infinite": (b'[{"id": 1, "similarity": 1e999}]', "similarity inf"),
    "great": (b'[{"id": 1, "similarity": 1' + b"0" * 400 + b"}]", "similarity 1000"),
    "none": ([{"id": 1}], "similarity None"),
    "too_much": (b"x" * 300_000, "more than 196608 bytes; leave image_path out"),
    "endless": (b"x" * 1_000_000, "more than 196608 bytes"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_is_none_is_one_line(name: str, service: Service) -> None:
    body, message = BAD_ANSWERS[name]
    service.answer = lambda _: body
    with pytest.raises(UsageError, match=message) as told:
        query_service(service.url, texts=["x"], k=2, policy=QUICK)
    assert re.fullmatch(r"[ -~]{1,500}", str(told.value)), "one line of plain letters"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, "answers 500: .*an index without embeddings of that modality"),
        (404, "answers 404"),
        (301, "answers 301"),
        (400, "answers 400"),
    ],
)
def test_a_refusal_is_not_asked_again(status: int, message: str, service: Service) -> None:
    service.status = lambda _: (status, {"Location": "http://elsewhere/"})
    with pytest.raises(UsageError, match=message):
        query_service(service.url, texts=["x"], k=2, policy=QUICK)
    assert service.calls == 1


@contextmanager
def raw(*pieces: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that sends the pieces with pauses between them, whatever it is asked, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    try:
                        client.recv(65536)
                        for piece in pieces:
                            client.sendall(piece)
                            time.sleep(pause)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b""], "no answer"),
        ([b"garbage\r\n\r\n"], "no answer"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[1"], "no answer .*98 more expected"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"], "no answer"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], "no answer .*more than 100 headers"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"], "no answer"),
    ],
)
def test_half_an_answer_is_none(pieces: list[bytes], message: str) -> None:
    with raw(*pieces) as url, pytest.raises(IncompleteError, match=message):
        service_indexes(url, QUICK)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_a_trickle_ends_at_the_deadline(head: bytes) -> None:
    policy = ServicePolicy(timeout_seconds=0.3, attempts=1)
    started = time.monotonic()
    with raw(head, *[b"a"] * 100, pause=0.05) as url, pytest.raises(IncompleteError, match=r"not done after 0\.3 s"):
        service_indexes(url, policy)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "url", ["", "pets", "ftp://pets/", "http://", "http://me:secret@pets/", "http://pets:port/", "file:///etc/passwd"]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="service "):
        query_service(url, texts=["x"], k=1, policy=QUICK)


def test_a_query_that_is_none(service: Service) -> None:
    with pytest.raises(UsageError, match="an empty text is no query"):
        query_service(service.url, texts=["x", " "], k=1, policy=QUICK)
    with pytest.raises(UsageError, match="k is at least 1"):
        query_service(service.url, texts=["x"], k=0, policy=QUICK)
    with pytest.raises(UsageError, match="a rating from 0 to 9"):
        query_service(service.url, texts=["x"], k=1, aesthetic=(10, 0.5), policy=QUICK)
    with pytest.raises(ValueError, match="finite numbers"):
        query_service(service.url, embeddings=np.array([[np.nan]]), k=1, policy=QUICK)
    with pytest.raises(ValueError, match="either texts or embeddings"):
        query_service(service.url, k=1, policy=QUICK)
    assert service.asked == []
