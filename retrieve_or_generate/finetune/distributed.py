"""One trial on several processes: each takes its share of every batch, and all make the same update.

`torchrun --nproc-per-node 8 -m retrieve_or_generate finetune …` starts them, or `rog finetune --processes 8`. The batches, their
order and what is drawn for each image are those of one process; gradients are added up before they are clipped, so the number of
processes changes an update by rounding alone. Messages go over gloo, gradients and features of GPUs over NCCL. The first process
chooses, prints and writes; the others follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from retrieve_or_generate.endings import is_out_of_memory
from retrieve_or_generate.errors import IncompleteError, UsageError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # the first process may fit a probe for hours while the others wait
_BUCKET_VALUES = 16 * 2**20  # gradients that are sent at once: 64 MiB, few enough calls and little memory
GRACE_SECONDS = 0.5  # for the process that failed to say why, before those that lost it say so
_SHORT = (
    "out of memory between the passes of a batch; free some, or set a smaller finetune.batch_size or finetune.model, "
    "and run it again"
)


class MemoryElsewhereError(MemoryError):
    """Another process found that passes of this size are too large for its memory."""


@dataclass(frozen=True)
class World:
    """The processes of a trial: this is the `rank`-th of `size`. Every method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    messages: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that chooses, prints and writes."""
        return self.rank == 0

    def part(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` things in a row are this process's (or another's); the first process never has fewer than another."""
        each, more = divmod(count, self.size)
        of = self.rank if rank is None else rank
        start = of * each + min(of, more)
        return slice(start, start + each + (of < more))

    def largest_part(self, count: int) -> int:
        """Of `count` things, as many as the process that has most of them."""
        return -(-count // self.size)

    def any(self, said: bool) -> bool:
        """Whether one of the processes says so."""
        if self.size == 1:
            return said
        flag = torch.tensor(int(said))
        with _contact():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.messages)
        return bool(flag)

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def check_memory(self, short: bool = False) -> None:
        """Before what a process gives to the others: did all have memory enough to get here?

        Raises:
            MemoryElsewhereError: one has not; it called this with `short`. Nobody has given anything.
        """
        if self.any(short) and not short:
            raise MemoryElsewhereError

    def agree(self, value: object, otherwise: str) -> None:
        """`UsageError` with these words unless all have an equal `value`, which must pickle."""
        if self.size > 1:
            values: list[object] = [None] * self.size
            with _contact():
                dist.all_gather_object(values, value, group=self.messages)
            if any(other != values[0] for other in values):
                raise UsageError(otherwise)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size == 1:
            return value
        total = value.clone()
        with _contact():
            dist.all_reduce(total)
        return total

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Leave the sum over all processes as the gradient of each parameter; one without any gradient keeps none.

        Raises:
            MemoryElsewhereError: as `check_memory`.
        """
        if self.size == 1:
            return
        self.check_memory()
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        with _contact():
            dist.all_reduce(has, dist.ReduceOp.MAX, group=self.messages)
            for some in _buckets([parameter for parameter, there in zip(parameters, has, strict=True) if there]):
                given = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
                total = torch.cat([gradient.flatten() for gradient in given])
                dist.all_reduce(total)
                for parameter, gradient in zip(some, total.split([p.numel() for p in some]), strict=True):
                    parameter.grad = gradient.view_as(parameter)

    def among(self, own: Tensor, count: int) -> Tensor:
        """(count, …): the rows of all processes in the order of `part`, of which `own` stay those that a gradient flows to.

        Raises:
            MemoryElsewhereError: as `check_memory`.
        """
        if self.size == 1:
            return own
        self.check_memory()
        padded = _padded(own.detach(), self.largest_part(count))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _contact():
            dist.all_gather(parts, padded)
        rows = [part[: _length(self.part(count, rank))] for rank, part in enumerate(parts)]
        rows[self.rank] = own
        return torch.cat(rows)

    def on_first(self, own: Tensor, lengths: Sequence[int]) -> Tensor:
        """(sum of `lengths`, …) on the first process: the rows of all, of which each has as many as it says; none elsewhere."""
        if self.size == 1:
            return own
        self.wait()  # as long as it takes: what carries tensors waits for minutes only
        padded = _padded(own, max(lengths))
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.first else None
        with _contact():
            dist.gather(padded, parts)
        if parts is None:
            return own[:0]
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; also the mistake of a user's that it finds."""
        if self.size == 1:
            return make()
        box: list[tuple[T | None, UsageError | None]] = [(None, None)]
        if self.first:
            try:
                box = [(make(), None)]
            except UsageError as error:
                box = [(None, error)]
        with _contact():
            dist.broadcast_object_list(box, group=self.messages)
        value, mistake = box[0]
        if mistake is not None:
            raise mistake
        return value  # type: ignore[return-value]

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Make these the first process's, in place."""
        if self.size > 1:
            self.wait()
            with _contact(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)


ALONE = World()


@contextmanager
def committed() -> Iterator[None]:
    """What cannot be taken back once it is begun: `IncompleteError` without memory for it, and nothing smaller is tried."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise IncompleteError(_SHORT) from error


@contextmanager
def _contact() -> Iterator[None]:
    """An exchange with all others, or `IncompleteError` where one of them has ended.

    The one that ended knows why, so it is left a moment to say so first.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise IncompleteError(_SHORT) from error
        time.sleep(GRACE_SECONDS)
        raise IncompleteError(
            "a process that trains with this one ended; what was saved last is kept, and the same command goes on from there"
        ) from error


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in groups of at most `_BUCKET_VALUES` values, in their order; a larger one is a group of its own."""
    some: list[Tensor] = []
    for parameter in parameters:
        if some and sum(p.numel() for p in some) + parameter.numel() > _BUCKET_VALUES:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def _padded(rows: Tensor, length: int) -> Tensor:
    """`rows` and zeros after them: what is exchanged must have one shape."""
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)
