"""Runs the real clip-retrieval, which lives in an environment of its own (make interop makes it)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from retrieve_or_generate.errors import IncompleteError
from retrieve_or_generate.retrieve.remote import ServicePolicy, service_indexes

ARCHITECTURE = "ViT-S-32-alt"  # the smallest that both versions of open_clip know
TOOLS = Path(os.environ.get("ROG_INTEROP", Path(__file__).parents[2] / ".venv-interop")) / "bin"


@dataclass(frozen=True)
class ClipRetrieval:
    """Runs the real tool."""

    model: str

    def command(self, *arguments: str) -> list[str]:
        if not (TOOLS / "python").exists():
            pytest.fail(f"{TOOLS}: no environment of clip-retrieval there; make interop installs it")
        return [str(TOOLS / "python"), str(Path(__file__).with_name("serve.py")), *arguments]

    def run(self, *arguments: str) -> None:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]

    def inference(self, source: str, out: Path, *options: str) -> None:
        self.run(
            *("inference", "--input_dataset", source, "--output_folder", str(out), "--clip_model", self.model),
            *("--num_prepro_workers", "0", "--batch_size", "8", *options),
        )

    def index(self, embeddings: Path, out: Path) -> None:
        self.run("index", "--embeddings_folder", str(embeddings), "--index_folder", str(out), "--nb_cores", "1")

    @contextmanager
    def back(self, indexes: dict[str, Path], scratch: Path) -> Iterator[str]:
        """Its service over folders of indexes, by name; the URL."""
        paths, log = scratch / "indices_paths.json", scratch / "back.log"
        paths.write_text(json.dumps({name: str(folder) for name, folder in indexes.items()}))
        port = free_port()
        options = ("--use_jit", "False", "--enable_mclip_option", "False", "--provide_aesthetic_embeddings", "False")
        options += ("--enable_faiss_memory_mapping", "True")
        command = self.command("back", "--indices_paths", str(paths), "--port", str(port), *options)
        with (
            log.open("w") as file,
            subprocess.Popen([*command, "--clip_model", self.model], stdout=file, stderr=subprocess.STDOUT) as server,
        ):
            try:
                url = f"http://127.0.0.1:{port}"
                wait_until_there(url, server, log)
                yield url
            finally:
                server.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_there(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            service_indexes(url, ServicePolicy(attempts=1, timeout_seconds=5))
            return
        except IncompleteError:
            time.sleep(1)
    pytest.fail(f"the service did not start: {log.read_text()[-3000:]}")
