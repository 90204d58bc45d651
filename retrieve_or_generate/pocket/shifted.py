"""Shifted test sets of the pocket tasks: the same classes drawn as no picture of the pool is.

`digits-shifted` is `digits` with `small`: the scans of its test pictures written smaller, anywhere on the paper. `textures-shifted`
has `faint`, new pictures of half the contrast. `aircraft-shifted` has `turned`, new pictures that fly to the side, of two makers in
three: a shift may show some classes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from retrieve_or_generate.pocket import drawing
from retrieve_or_generate.pocket.captions import VOCABULARIES
from retrieve_or_generate.pocket.pictures import Labelled, encode_jpeg, evaluation_scans
from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.seeds import generator_for

_PER_CLASS = 40
_CONTRAST = 1 / 2
_SIDES = (23, 28)  # of the 32 that all others take up, in pixels
_DEGREES = (30, 50)  # those of the pool are turned by up to 23
_MAKERS = ("merlin", "falcon")


@dataclass(frozen=True)
class Shift:
    """`of` names the task; `pictures` draws the test set."""

    name: str
    of: str
    pictures: Callable[[np.random.Generator], Iterator[Labelled]]

    def drawn(self) -> tuple[Labelled, ...]:
        """The pictures in the order of their keys."""
        return tuple(self.pictures(generator_for(SEED_STUDY, "shift", self.of, self.name)))


def _small(rng: np.random.Generator) -> Iterator[Labelled]:
    for scan, label in zip(*evaluation_scans("test"), strict=True):
        written = Image.fromarray(drawing.digit(scan, rng, drawing.pick_ink_and_paper(rng)))
        side = int(rng.integers(*_SIDES))
        paper = Image.new("RGB", written.size, tuple(np.asarray(written)[0, 0].tolist()))
        left, top = rng.integers(0, drawing.SIZE - side + 1, 2).tolist()
        paper.paste(written.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        yield Labelled(encode_jpeg(np.asarray(paper)), int(label))


def _faint(rng: np.random.Generator) -> Iterator[Labelled]:
    names = VOCABULARIES["textures"].class_names
    for label in rng.permutation(np.arange(_PER_CLASS * len(names)) % len(names)).tolist():
        image = drawing.texture(names[label], rng, drawing.pick_colours(rng)).astype(np.float64)
        middle = image.mean((0, 1))
        yield Labelled(encode_jpeg(np.rint(middle + _CONTRAST * (image - middle)).astype(np.uint8)), label)


def _turned(rng: np.random.Generator) -> Iterator[Labelled]:
    names = VOCABULARIES["aircraft"].class_names
    shown = [label for label, name in enumerate(names) if name.split(" ")[0] in _MAKERS]
    for label in rng.permutation(np.repeat(shown, _PER_CLASS)).tolist():
        maker, engines = names[label].split(" ")
        image = drawing.aircraft(maker, int(engines), rng, drawing.pick_aircraft_colours(rng))
        angle = float(rng.choice((-1, 1)) * rng.uniform(*_DEGREES))
        sky = tuple(image[0, 0].tolist())
        turned = Image.fromarray(image).rotate(angle, Image.Resampling.BICUBIC, fillcolor=sky)
        yield Labelled(encode_jpeg(np.asarray(turned)), label)


SHIFTED = {
    f"{shift.of}-shifted": shift
    for shift in (
        Shift("small", "digits", _small),
        Shift("faint", "textures", _faint),
        Shift("turned", "aircraft", _turned),
    )
}
"""By the name of the task that has it."""
