"""Which descriptor finds copies: a learned one when its weights are given, thumbnails otherwise; the set's record names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieve_or_generate.curate import thumbnail
from retrieve_or_generate.curate.kinds import Kind, View
from retrieve_or_generate.curate.near import Comparison, cosine_comparison
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.store import sha256_of

if TYPE_CHECKING:
    import torch

_THRESHOLDS = {"sscd": 0.75, "isc": 0.604169}
"""SSCD: 90 % precision on DISC (its README). ISC: the cut-off of DataComp and of 2406.05184, appendix B.2."""


@dataclass(frozen=True)
class Descriptor:
    """What finds copies. `record` is what an image set says of it; of a learned one, the file's first 16 hex digits, not its path.

    `is_precise`: what it finds are copies without a second opinion.
    """

    name: str
    record: dict[str, Any]
    path: Path | None = None
    threshold: float = 0.0

    @property
    def is_precise(self) -> bool:
        return self.path is not None

    def kind(self, size: int, device: torch.device | str) -> Kind:
        """What to compute of every picture; loads the weights. Thumbnails are made of the square that the CLIP model sees."""
        if self.path is None:
            return Kind(self.name, self.name, View("square", size), thumbnail.describe)
        from retrieve_or_generate.curate.learned import load_isc, load_sscd

        network = (load_isc if self.name == "isc" else load_sscd)(self.path, device)
        return Kind(self.name, self.record["weights"], View("whole", network.size), network.describe)

    def comparison(self, a: np.ndarray, b: np.ndarray) -> Comparison:
        """How descriptors of two collections are compared."""
        return thumbnail.comparison(a, b) if self.path is None else cosine_comparison(a, b, self.threshold)


def find_descriptor(settings: CurateSettings) -> Descriptor:
    """The descriptor that the settings ask for; `UsageError` if its weights are not there. Loads nothing."""
    kind, _, path = settings.descriptor.rpartition(":")
    if settings.descriptor == "thumbnail":
        if settings.descriptor_threshold is not None:
            raise UsageError(
                "curate.descriptor_threshold: only a learned descriptor has one; thumbnails have tolerances"
            )
        return Descriptor(thumbnail.NAME, {"name": thumbnail.NAME})
    kind, file = (kind, Path(path)) if kind in _THRESHOLDS else ("sscd", Path(settings.descriptor))
    if not file.is_file():
        raise UsageError(
            f"curate.descriptor: {file}: no such file; give 'thumbnail', the path of an SSCD model "
            "(sscd_disc_mixup.torchscript.pt), or isc: and the path of isc_ft_v107.pth.tar"
        )
    threshold = settings.descriptor_threshold or _THRESHOLDS[kind]
    return Descriptor(
        kind, {"name": kind, "weights": sha256_of(file)[:16], "threshold": threshold}, file, float(threshold)
    )
