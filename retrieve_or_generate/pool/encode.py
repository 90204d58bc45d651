"""Pictures and captions through a CLIP model in a fixed order: decoded in threads to uint8, resized and normalised where it runs.

Decoders release the interpreter, so threads keep every core busy and nothing is copied between processes. What leaves them is a
byte a channel; pictures of one size are resized together, on the device, to the pixels that `pixels.to_square` gives.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from retrieve_or_generate.models import Clip, plain_attention
from retrieve_or_generate.pixels import UndecodableImage
from retrieve_or_generate.pool.sources import Sample
from retrieve_or_generate.pool.squares import Square, square_of

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHUNK = 32  # pictures that a thread decodes, or that are resized, at a time: they stay in the cache and their memory is reused


@dataclass(frozen=True)
class Picture:
    """A sample decoded, with what its source tells of it; or the reason why it is none."""

    sample: Sample
    reason: str
    bytes: int = 0
    square: Square | None = None
    md5: str = ""
    told: dict[str, Any] = field(default_factory=dict)


def decoded(sample: Sample, size: int) -> Picture:
    """The picture of a sample for a model that takes `size` pixels."""
    data = sample.image_bytes()
    if data is None:
        return Picture(sample, ": ".join(filter(None, ("no_image", sample.why))))
    try:
        square = square_of(data, size)
    except UndecodableImage as error:
        return Picture(sample, f"undecodable: {error}", len(data))
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return Picture(sample, "", len(data), square, md5, sample.told())


def decoded_batches(
    samples: Iterable[Sample], size: int, batch_size: int, threads: ThreadPoolExecutor, ahead: int
) -> Iterator[list[Picture]]:
    """Pictures in the order of `samples`, `batch_size` at a time, decoded up to `ahead` chunks before they are asked for."""
    stream, running = iter(samples), deque[Future[list[Picture]]]()

    def fill() -> None:
        while len(running) < ahead and (chunk := list(islice(stream, _CHUNK))):
            running.append(threads.submit(_decode_chunk, chunk, size))

    batch: list[Picture] = []
    fill()
    while running:
        batch += running.popleft().result()
        fill()
        while len(batch) >= batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


def _decode_chunk(samples: Sequence[Sample], size: int) -> list[Picture]:
    return [decoded(sample, size) for sample in samples]


class Encoder:
    """A model on its device, with the memory that its batches reuse. `precision` is that of its products."""

    def __init__(self, clip: Clip, precision: str = "float32"):
        self.clip, self.precision = clip, precision
        size = clip.image_size
        self.scale = (
            (1 / (255 * clip.std)).flatten().repeat(size)
        )  # (s · 3,): of a line of pixels, as they lie in memory
        self.shift = (clip.mean / clip.std).flatten().repeat(size)
        self.lines = torch.empty(0, size, size * 3, device=clip.device)

    @torch.inference_mode()
    def images(self, squares: Sequence[np.ndarray]) -> torch.Tensor:
        """(side, side, 3) uint8 each to (n, d) float16, unit length, on the device."""
        if len(self.lines) < len(squares):
            self.lines = self.lines.new_empty(len(squares), *self.lines.shape[1:])
        lines = self.lines[: len(squares)]
        self._place(squares, lines)
        pixels = lines.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)  # (n, 3, s, s), channels last in memory
        with plain_attention(self.clip.device), self._products():
            features = self.clip.network.encode_image(pixels)
        return F.normalize(features.float(), dim=-1).half()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float16, unit length, on the device."""
        with self._products():
            return self.clip.encode_text(texts).half()

    def _products(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.clip.device.type, dtype) if dtype else nullcontext()

    def _place(self, squares: Sequence[np.ndarray], lines: torch.Tensor) -> None:
        """Resize and normalise the squares into `lines` (n, s, s · 3) float32."""
        size = lines.shape[1]
        by_side: dict[int, list[int]] = {}
        for place, square in enumerate(squares):
            by_side.setdefault(len(square), []).append(place)
        for places in by_side.values():
            for start in range(0, len(places), _CHUNK):
                some = places[start : start + _CHUNK]
                block = torch.from_numpy(np.stack([squares[place] for place in some])).to(lines.device)
                ready = resized(block.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).flatten(2)  # (n, s, s · 3)
                for place, one in zip(some, ready, strict=True):  # one at a time: it stays in the cache
                    lines[place].copy_(one).mul_(self.scale).sub_(self.shift)


def resized(block: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, side, side) uint8 to (n, 3, size, size): bicubic with antialiasing, whole numbers 0 to 255 as Pillow's."""
    if block.shape[-1] == size:
        return block
    if block.device.type == "cpu":
        return F.interpolate(block, (size, size), mode="bicubic", antialias=True)
    ready = F.interpolate(block.float(), (size, size), mode="bicubic", antialias=True)
    return ready.round_().clamp_(0, 255)


def each_once(texts: Sequence[str], encode: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """`encode` of `texts`, asked once for equal ones."""
    distinct, place = np.unique(np.array(texts, object), return_inverse=True)
    return encode(distinct.tolist())[torch.from_numpy(place)]
