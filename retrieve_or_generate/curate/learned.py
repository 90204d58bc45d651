"""Learned copy descriptors, from weights that the user has: SSCD (arXiv 2202.10261) and the winner of the ISC21 descriptor track.

A descriptor is a vector of unit length; pictures are copies from an inner product on. Both look at the whole picture, brought to a
square whatever its shape, as their authors advise. They also find crops, overlays, filters and flips, which thumbnails do not.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F

from retrieve_or_generate.errors import IntegrityError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SSCD_SIZE = 320
_ISC_FEATURES = 256
_BATCH = 64


class LearnedDescriptor:
    """A network with its own size and normalisation. `dimension` is that of its vectors."""

    def __init__(
        self,
        name: str,
        network: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
        device: torch.device | str,
    ):
        self._name, self._network, self._device, self.size = name, network, device, size
        self._mean, self._std = (torch.tensor(part, device=device).view(1, 3, 1, 1) for part in normalisation)
        self.dimension = self._run(np.zeros((1, 3, size, size), np.uint8)).shape[1]

    def describe(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 3, size, size) uint8 to (n, dimension) float32, unit length. `IntegrityError` if the weights give no such vectors."""
        parts = [self._run(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *parts])

    @torch.inference_mode()
    def _run(self, pixels: np.ndarray) -> np.ndarray:
        scaled = torch.from_numpy(pixels).to(self._device).float() / 255
        try:
            out = self._network((scaled - self._mean) / self._std)
            vectors = F.normalize(out.float(), dim=1).cpu().numpy()
        except (RuntimeError, AttributeError, TypeError, IndexError) as error:
            raise IntegrityError(
                f"curate.descriptor: {self._name}: the network does not run ({_first_line(error)})"
            ) from error
        if vectors.ndim != 2 or len(vectors) != len(pixels) or not np.isfinite(vectors).all():
            raise IntegrityError(f"curate.descriptor: {self._name}: gives no finite vector for each picture")
        return np.asarray(vectors)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def load_sscd(path: Path, device: torch.device | str) -> LearnedDescriptor:
    """A published `sscd_*.torchscript.pt`. A TorchScript file is a program: take it from its authors only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # TorchScript is deprecated, but it is what SSCD is published as
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise IntegrityError(f"curate.descriptor: {path}: not a TorchScript model ({_first_line(error)})") from error
    return LearnedDescriptor(path.name, network, _SSCD_SIZE, _IMAGENET, device)


class _IscNetwork(torch.nn.Module):
    """The network that `isc_ft_v107.pth.tar` holds: average of the positive part of a timm trunk's last map, to 256 numbers."""

    def __init__(self, architecture: str):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm has renamed the architecture since
            self.backbone = timm.create_model(architecture, features_only=True, pretrained=False)
        self.fc = torch.nn.Linear(self.backbone.feature_info.channels()[-1], _ISC_FEATURES, bias=False)
        self.bn = torch.nn.BatchNorm1d(_ISC_FEATURES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = self.backbone(pixels)[-1].clamp(min=1e-6).mean((2, 3))
        return self.bn(self.fc(pooled))


def _isc_checkpoint(path: Path) -> dict[str, Any]:
    """`arch`, `args` and `state_dict`, read as plain data: nothing in the file can run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
        return {"arch": checkpoint["arch"], "size": int(checkpoint["args"].input_size), "weights": weights}
    except Exception as error:  # unpickling answers damage with many types
        raise IntegrityError(f"curate.descriptor: {path}: not an ISC21 checkpoint ({_first_line(error)})") from error


def load_isc(path: Path, device: torch.device | str) -> LearnedDescriptor:
    """The published `isc_ft_v107.pth.tar` (ISC21 descriptor track, first place), or one of the same form."""
    checkpoint = _isc_checkpoint(path)
    try:
        network = _IscNetwork(checkpoint["arch"])
        network.load_state_dict(checkpoint["weights"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"curate.descriptor: {path}: its weights do not fit its architecture ({_first_line(error)})"
        ) from error
    config = network.backbone.default_cfg
    normalisation = (tuple(config["mean"]), tuple(config["std"]))
    return LearnedDescriptor(path.name, network.to(device).eval(), checkpoint["size"], normalisation, device)
