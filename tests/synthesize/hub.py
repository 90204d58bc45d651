"""A model hub on loopback: what huggingface_hub asks of one, answered from folders, with commits, branches and tags."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest


@dataclass
class Repository:
    """Commits as folders, and what the names of revisions stand for; `closed` is the error that the hub answers with instead."""

    commits: dict[str, Path]
    revisions: dict[str, str]
    closed: str = ""

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


@dataclass
class Hub:
    url: str
    repositories: Mapping[str, Repository]
    asked: list[str] = field(default_factory=list)
    """Method and path of each request."""


def commit_of(text: str) -> str:
    """Something that looks like a commit."""
    return hashlib.sha1(text.encode()).hexdigest()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Refused(Exception):
    """Ends a request with a status and the hub's word for it."""


@contextmanager
def hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Serve `repositories` by Hub id."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.asked.append(f"{self.command} {self.path}")
            path = unquote(self.path.partition("?")[0]).strip("/")
            try:
                self.api(path.removeprefix("api/models/")) if path.startswith("api/models/") else self.file(path)
            except _Refused as refused:
                self.answer(refused.args[0], b"{}", {"X-Error-Code": refused.args[1]})

        do_HEAD = do_GET

        def found(self, name: str, revision: str) -> tuple[str, Path]:
            repository = repositories.get(name)
            if repository is None:
                raise _Refused(404, "RepoNotFound")
            if repository.closed:
                raise _Refused(403, repository.closed)
            commit = repository.commit(revision)
            if commit is None:
                raise _Refused(404, "RevisionNotFound")
            return commit, repository.commits[commit]

        def api(self, path: str) -> None:
            """ORG/NAME, ORG/NAME/revision/REVISION or ORG/NAME/tree/COMMIT."""
            organisation, name, *rest = path.split("/")
            commit, folder = self.found(f"{organisation}/{name}", "/".join(rest[1:]) or "main")
            paths = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
            if rest[:1] == ["tree"]:
                listed: object = [
                    {"type": "file", "path": key, "size": one.stat().st_size, "oid": _etag(one)}
                    for key, one in paths.items()
                ]
            else:
                siblings = [{"rfilename": key} for key in paths]
                listed = {
                    "id": f"{organisation}/{name}",
                    "sha": commit,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
            self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

        def file(self, path: str) -> None:
            """ORG/NAME/resolve/REVISION/FILE; what else the library asks for is not there."""
            if path.count("/") < 4:
                raise _Refused(404, "EntryNotFound")
            organisation, name, _, revision, *rest = path.split("/")
            commit, folder = self.found(f"{organisation}/{name}", revision)
            found = folder.joinpath(*rest)
            if not found.is_file():
                raise _Refused(404, "EntryNotFound")
            self.answer(200, found.read_bytes(), {"ETag": f'"{_etag(found)}"', "X-Repo-Commit": commit})

        def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Tests read `asked` instead."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        served = Hub(f"http://127.0.0.1:{server.server_address[1]}", repositories)
        yield served
        server.shutdown()
    thread.join(5)


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT and HF_HUB_CACHE do before a program starts."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", url)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
