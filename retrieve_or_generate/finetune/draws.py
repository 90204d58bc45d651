"""The random numbers of a batch: drawn on the CPU for all of it, whoever works on which part, so no device changes one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Numbers for the `rows` of a batch of `count` images. Each call draws for the whole batch, so all processes draw the same."""

    generator: torch.Generator
    count: int
    rows: slice = field(default_factory=lambda: slice(None))

    def uniform(self, *each: int) -> Tensor:
        """(*each, rows) float32 in [0, 1)."""
        return torch.rand((*each, self.count), generator=self.generator)[..., self.rows]

    def integers(self, low: int, high: int, *each: int) -> Tensor:
        """(*each, rows) int64, `high` not among them."""
        return torch.randint(low, high, (*each, self.count), generator=self.generator)[..., self.rows]

    def seed(self) -> int:
        """Of another generator, such as one of the device."""
        return int(torch.randint(2**62, (), generator=self.generator))


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A few `values` of the CPU on `device`. A GPU under way is not waited for: its driver has read them when this returns."""
    return values.to(device, non_blocking=device.type == "cuda")
