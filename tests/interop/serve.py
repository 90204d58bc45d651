"""clip-retrieval's own command line, its server held to loopback: by itself it binds every interface. Runs in .venv-interop."""

from __future__ import annotations

import sys
from typing import Any

from clip_retrieval.cli import main
from flask import Flask

_run = Flask.run


def _run_on_loopback(self: Flask, host: str | None = None, port: int | None = None, **options: Any) -> None:
    _run(self, "127.0.0.1", port, **options)


Flask.run = _run_on_loopback
sys.argv[0] = "clip-retrieval"
main()
