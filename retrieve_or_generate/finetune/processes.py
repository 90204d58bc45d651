"""How the processes of a trial come together: those that torchrun started, or that are started here as torchrun would."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Timer
from typing import TypeVar

import torch
import torch.distributed as dist

from retrieve_or_generate.errors import IncompleteError, UsageError
from retrieve_or_generate.executors import Unit, run_units
from retrieve_or_generate.finetune.distributed import ALONE, GRACE_SECONDS, PATIENCE, World
from retrieve_or_generate.progress import Progress

T = TypeVar("T")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""


def place() -> tuple[int, int]:
    """Which of how many processes of one trial this is, as torchrun said."""
    if not all(name in os.environ for name in _PLACE):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def together(call: Callable[[], T], processes: int, progress: Progress | None = None) -> T:
    """`call` in so many processes of this machine, each of which finds itself `assembled` with the others; what the first returns.

    `call` must pickle. A process that dies ends the others. `progress` hears what they tell.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    units = [Unit(f"process {rank} of {processes}", rank) for rank in range(processes)]
    prepare = partial(_in_place, call, processes, store.port)
    made = run_units(units, prepare, processes, apart=True, progress=progress)
    return {unit.payload: result for unit, result in made}[0]


def placed(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun would tell the `rank`-th of so many processes of this machine, which meet at a store at this port."""
    values = (rank, processes, rank, processes, "127.0.0.1", port)
    told = {name: str(value) for name, value in zip(_PLACE, values, strict=True)}
    return told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is there already


def _in_place(call: Callable[[], T], processes: int, port: int) -> Callable[[int], T]:
    """What does the work of one rank in a process of its own."""

    def work(rank: int) -> T:
        os.environ |= placed(rank, processes, port)
        try:
            return call()
        except Exception:
            Timer(GRACE_SECONDS, os._exit, (1,)).start()  # once the error is told, the others are to notice
            raise

    return work


@contextmanager
def assembled(device: str) -> Iterator[tuple[World, str]]:
    """The processes that torchrun started with this one, and the device that is this one's; alone where it started none.

    Raises:
        UsageError: one GPU for all, or fewer GPUs than processes.
    """
    if place() == (0, 1):
        yield ALONE, device
        return
    own = _own_device(device)
    on_gpu = own != "cpu"
    rank, size = place()
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    try:
        messages = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(messages, dist.ProcessGroup)
        yield World(rank, size, messages), own
    except (UsageError, IncompleteError) as error:
        if dist.is_torchelastic_launched() and store.add(f"said: {error}", 1) > 1:
            raise SystemExit(error.exit_code) from error  # another process says it
        raise
    except SystemExit:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()  # not after an error: NCCL would wait for those that wait for this process


def _own_device(device: str) -> str:
    """The GPU of this process among those of its machine; the CPU where that was asked for."""
    if device == "cpu":
        return device
    here, processes, gpus = (
        *(int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")),
        torch.cuda.device_count(),
    )
    if device != "cuda":
        raise UsageError(f"--device {device} is one for all processes; --device cuda gives each a GPU of its own")
    if max(processes, here + 1) > gpus:
        raise UsageError(
            f"{max(processes, here + 1)} processes on this machine, which has {gpus} GPUs; start one for each"
        )
    torch.cuda.set_device(here)
    return f"cuda:{here}"
