"""What the last bits of a product follow from: the type that it is taken in, and the threads that share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def native(precision: str, device: torch.device) -> torch.dtype:
    """torch's type of this name; a CPU without instructions for bfloat16 keeps to float32, many times faster there."""
    if precision == "bfloat16" and device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return torch.bfloat16 if any(known[name] for name in known if name.endswith("bf16")) else torch.float32
    wanted: torch.dtype = getattr(torch, precision)
    return wanted


@contextmanager
def one_thread() -> Iterator[None]:
    """Products on one thread, as in a worker: what is kept of them is the same however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
