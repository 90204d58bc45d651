"""The type that products are taken in: the one asked for, where the hardware multiplies it."""

from __future__ import annotations

import torch


def native(precision: str, device: torch.device) -> torch.dtype:
    """torch's type of this name; a CPU without instructions for bfloat16 keeps to float32, many times faster there."""
    if precision == "bfloat16" and device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return torch.bfloat16 if any(known[name] for name in known if name.endswith("bf16")) else torch.float32
    wanted: torch.dtype = getattr(torch, precision)
    return wanted
