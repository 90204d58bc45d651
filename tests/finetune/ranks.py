"""Two processes that train together over gloo and do one thing after another, so that tests do not each wait for their start."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from retrieve_or_generate.finetune import processes as launched

R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    processes: list[BaseProcess]
    pipes: list[Connection]

    def __call__(self, call: Callable[..., R], *given: Any) -> list[R]:
        """What `call(world, *given)` gives in each of the processes; `call` stands in a module that they can import."""
        for pipe in self.pipes:
            pipe.send((call, given))
        answers: dict[Any, Any] = {}
        failed = None
        while len(answers) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in answers], timeout=2 if failed else 120)
            if not ready:  # the others wait for one that failed
                break
            answers |= {pipe: pipe.recv() for pipe in ready}  # type: ignore[union-attr]
            failed = failed or next((one for one in answers.values() if isinstance(one, BaseException)), None)
        if failed:
            raise failed
        assert len(answers) == len(self.pipes), "a process hangs"
        return [answers[pipe] for pipe in self.pipes]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(20)
            process.kill()


def start(count: int = 2) -> tuple[Ranks, dist.TCPStore]:
    """The processes, and what they meet at, which must live as long as they do."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "open_clip"])
    pipes, processes = zip(*(_started(context, rank, count, store.port) for rank in range(count)), strict=True)
    return Ranks(list(processes), list(pipes)), store


def _started(context: Any, rank: int, count: int, port: int) -> tuple[Connection, BaseProcess]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, count, port, theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _serve(rank: int, count: int, port: int, pipe: Connection) -> None:
    os.environ |= launched.placed(rank, count, port)
    torch.set_num_threads(1)
    with launched.assembled("cpu") as (world, _):
        while True:
            try:
                call, given = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(call(world, *given))
            except BaseException as error:
                pipe.send(error)
