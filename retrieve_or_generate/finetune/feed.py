"""Batches of a training set on the device, in an order that is given: gathered ahead where the set does not live there.

A set that fits lies on the device for as long as it is trained on. Another one stays where it is, in memory or mapped: a few
threads gather batches before they are asked for, and on a GPU copy them from pinned memory beside the products. Bytes per pixel
travel, nothing else; what is trained on is the same to the last bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrieve_or_generate.finetune.data import Chosen, Joined, Pixels
from retrieve_or_generate.finetune.draws import sent

AHEAD = 4  # batches that are gathered at once: what is mapped waits for the disk
_SHARE = 0.5  # of the device's free memory that a set may take: the rest is for activations


def lives_on_device(images: Pixels, device: torch.device) -> bool:
    """Whether all images go to the device at once: on a GPU if there is room, on a CPU if they are in memory anyway."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of what was let go
        return _bytes_of(images) <= _SHARE * (free + kept)
    return not isinstance(images, Chosen | Joined | np.memmap)


class Feed:
    """Gives the images at one array of rows after another of `order`, (b, 3, s, s) uint8 on `device`.

    `waited` are the seconds that were spent waiting for them. `resident` is `lives_on_device` unless said. The order is read as far
    ahead as batches are gathered.
    """

    def __init__(
        self,
        images: Pixels,
        order: Iterator[np.ndarray],
        device: torch.device,
        resident: bool | None = None,
    ):
        self.order, self.device, self.waited = order, device, 0.0
        self.resident = lives_on_device(images, device) if resident is None else resident
        self._images, self._running = images, deque[tuple[np.ndarray, Future[_Batch]]]()
        self._whole = _on_device(images, device) if self.resident else None
        self._threads = None if self.resident else ThreadPoolExecutor(AHEAD, "images")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and not self.resident else None

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> tuple[np.ndarray, Tensor]:
        """The next rows, and the images there."""
        if self._whole is not None:
            rows = next(self.order)
            return rows, self._whole[sent(torch.from_numpy(rows), self.device)]
        self._fill()
        if not self._running:
            raise StopIteration
        rows, running = self._running.popleft()
        started = time.perf_counter()
        batch = running.result()
        self.waited += time.perf_counter() - started
        self._fill()
        return rows, batch.ready()

    def _fill(self) -> None:
        assert self._threads is not None
        while len(self._running) < AHEAD and (rows := next(self.order, None)) is not None:
            self._running.append((rows, self._threads.submit(self._gathered, rows)))

    def _gathered(self, rows: np.ndarray) -> _Batch:
        """In a thread: the rows copied together, and on their way."""
        if self._stream is None:
            return _Batch(torch.from_numpy(self._images[rows]).to(self.device))
        pinned = torch.from_numpy(self._images[rows]).pin_memory()
        with torch.cuda.stream(self._stream):
            arrived = torch.cuda.Event()
            images = pinned.to(self.device, non_blocking=True)
            arrived.record(self._stream)
        return _Batch(images, arrived)


@dataclass(frozen=True)
class _Batch:
    images: Tensor
    arrived: torch.cuda.Event | None = None

    def ready(self) -> Tensor:
        """The images, for products that are asked for from now on."""
        if self.arrived is not None:
            current = torch.cuda.current_stream(self.images.device)
            self.arrived.wait(current)
            self.images.record_stream(current)
        return self.images


def in_order(images: Pixels, batch_size: int, device: torch.device, batches: slice | None = None) -> Iterator[Tensor]:
    """All images from the first to the last, or those of some `batches`, (b, 3, s, s) uint8 on `device`, gathered ahead."""
    if device.type == "cpu" and lives_on_device(images, device):
        yield from torch.from_numpy(np.asarray(images)).split(batch_size)[batches or slice(None)]
        return
    rows = np.array_split(np.arange(len(images)), range(batch_size, len(images), batch_size))[batches or slice(None)]
    for _, batch in Feed(images, iter(rows), device, resident=False):
        yield batch


def _on_device(images: Pixels, device: torch.device) -> Tensor:
    """All of them; what is mapped goes piece by piece, so that no second copy of it is in memory."""
    if device.type == "cpu" and lives_on_device(images, device):
        return torch.from_numpy(np.asarray(images))
    whole = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 1024):
        whole[start : start + 1024] = torch.from_numpy(np.array(images[start : start + 1024])).to(device)
    return whole


def _bytes_of(images: Pixels) -> int:
    return int(np.prod(images.shape, dtype=np.int64))
