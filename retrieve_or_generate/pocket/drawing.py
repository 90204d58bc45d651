"""Draws the pocket world's pictures: digits, textures, aircraft, and the things that are none of these.

Every function takes a `numpy.random.Generator` and returns a (32, 32, 3) uint8 RGB array. Pictures have two or three
flat colours and no pixel noise: that keeps them readable to the eye at 32 pixels, and learnable for a generator that
is trained in an hour on two cores, without making the classes easier to tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
_OVERSAMPLE = 4
_CANVAS = SIZE * _OVERSAMPLE

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 32),
    "white": (244, 244, 240),
    "red": (204, 44, 44),
    "green": (40, 140, 70),
    "blue": (40, 80, 190),
    "yellow": (240, 205, 60),
    "purple": (120, 60, 150),
    "brown": (120, 76, 44),
    "sky": (150, 200, 240),
}
LIGHT = ("white", "yellow", "sky")
DARK = ("black", "blue", "purple", "green", "red", "brown")

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


def pick_colours(rng: np.random.Generator) -> tuple[str, str]:
    """Names of a foreground and a background colour that contrast, either of them the lighter."""
    light, dark = str(rng.choice(LIGHT)), str(rng.choice(DARK))
    return (light, dark) if rng.random() < 0.4 else (dark, light)


def pick_ink_and_paper(rng: np.random.Generator) -> tuple[str, str]:
    """Names of a dark foreground and a light background colour."""
    return str(rng.choice(DARK)), str(rng.choice(LIGHT))


def _jitter(name: str, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.asarray(COLOURS[name]) + rng.integers(-10, 11, 3), 0, 255).astype(np.float64)


def blend(alpha: np.ndarray, foreground: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Paint `foreground` over `background` with coverage `alpha` (32, 32) in [0, 1]."""
    image = alpha[..., None] * foreground + (1 - alpha[..., None]) * background
    return np.rint(image).astype(np.uint8)


# --- digits -------------------------------------------------------------------------------------------------------


def digit(scan: np.ndarray, rng: np.random.Generator, colours: tuple[str, str]) -> np.ndarray:
    """A real UCI scan (8, 8), values 0..16, enlarged, shifted by up to two pixels, in two colours."""
    side = int(rng.integers(26, 31))
    ink = Image.fromarray(np.uint8(scan / 16 * 255)).resize((side, side), Image.Resampling.BICUBIC)
    canvas = np.zeros((SIZE, SIZE))
    top, left = ((SIZE - side) // 2 + int(rng.integers(-1, 2)) for _ in range(2))
    canvas[max(top, 0) : top + side, max(left, 0) : left + side] = np.asarray(ink, dtype=np.float64)[
        max(-top, 0) : SIZE - top, max(-left, 0) : SIZE - left
    ]
    alpha = np.clip((canvas / 255 - 0.3) / 0.35, 0, 1)
    return blend(alpha, _jitter(colours[0], rng), _jitter(colours[1], rng))


# --- textures -----------------------------------------------------------------------------------------------------


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _turned(rng: np.random.Generator, most: float) -> tuple[np.ndarray, np.ndarray]:
    """The pixel grid turned by up to `most` radians and shifted by up to half a period."""
    angle = rng.uniform(-most, most)
    x, y = _grid()
    u = math.cos(angle) * x + math.sin(angle) * y + rng.uniform(-5, 5)
    v = -math.sin(angle) * x + math.cos(angle) * y + rng.uniform(-5, 5)
    return u, v


def _cosine(phase: np.ndarray, period: float) -> np.ndarray:
    return np.cos(2 * np.pi * phase / period)


def _triangle(phase: np.ndarray, period: float) -> np.ndarray:
    return np.abs((phase / period) % 1 - 0.5) * 4 - 1


def _striped(rng: np.random.Generator) -> np.ndarray:
    u, _ = _turned(rng, math.pi / 2)
    return _cosine(u, rng.uniform(8, 12))


def _dotted(rng: np.random.Generator) -> np.ndarray:
    u, v = _turned(rng, math.pi / 4)
    period = rng.uniform(10, 13)
    return _cosine(u, period) + _cosine(v, period) - 0.75


def _chequered(rng: np.random.Generator) -> np.ndarray:
    u, v = _turned(rng, math.pi / 8)
    period = rng.uniform(12, 16)
    return 2.5 * _cosine(u, period) * _cosine(v, period)


def _zigzagged(rng: np.random.Generator) -> np.ndarray:
    u, v = _turned(rng, math.pi / 8)
    return _cosine(v + 3.2 * _triangle(u, rng.uniform(13, 16)), rng.uniform(9, 11))


def _gridded(rng: np.random.Generator) -> np.ndarray:
    u, v = _turned(rng, math.pi / 8)
    period = rng.uniform(10, 13)
    return np.maximum(_cosine(u, period), _cosine(v, period)) - 0.72


def _wavy(rng: np.random.Generator) -> np.ndarray:
    u, v = _turned(rng, math.pi / 8)
    return _cosine(u + 2.6 * np.sin(2 * np.pi * v / rng.uniform(15, 19)), rng.uniform(9, 11))


def _spiralled(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid()
    x, y = x - rng.uniform(-3, 3), y - rng.uniform(-3, 3)
    turn = rng.choice((-1.0, 1.0)) * np.arctan2(y, x) + rng.uniform(0, 2 * math.pi)
    return np.cos(2 * np.pi * np.hypot(x, y) / rng.uniform(9, 11) + turn)


def _blotchy(rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.normal(size=(6, 6)).astype(np.float32))
    smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float64)
    return (smooth - np.median(smooth)) / smooth.std() * 1.5


TEXTURES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "striped": _striped,
    "dotted": _dotted,
    "chequered": _chequered,
    "zigzagged": _zigzagged,
    "gridded": _gridded,
    "wavy": _wavy,
    "spiralled": _spiralled,
    "blotchy": _blotchy,
}


def texture(name: str, rng: np.random.Generator, colours: tuple[str, str]) -> np.ndarray:
    """One of `TEXTURES`, filling the picture, in two colours."""
    alpha = np.clip(0.5 + 1.2 * TEXTURES[name](rng), 0, 1)
    return blend(alpha, _jitter(colours[0], rng), _jitter(colours[1], rng))


# --- shapes drawn with a pen --------------------------------------------------------------------------------------


class Pen:
    """Draws in unit coordinates (x right, y down, the picture is [-1, 1]²), turned and shifted, anti-aliased."""

    def __init__(self, background: Colour, angle: float = 0.0, shift: tuple[float, float] = (0, 0), zoom: float = 1.0):
        self._image = Image.new("RGB", (_CANVAS, _CANVAS), background)
        self._draw = ImageDraw.Draw(self._image)
        self._cos, self._sin = zoom * math.cos(angle), zoom * math.sin(angle)
        self._zoom, self._shift = zoom, shift

    def _place(self, x: float, y: float) -> tuple[float, float]:
        u = self._cos * x - self._sin * y + self._shift[0]
        v = self._sin * x + self._cos * y + self._shift[1]
        return (u + 1) / 2 * _CANVAS, (v + 1) / 2 * _CANVAS

    def polygon(self, points: Points, colour: Colour) -> None:
        self._draw.polygon([self._place(*point) for point in points], fill=colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        u, v = self._place(x, y)
        r = radius * self._zoom * _CANVAS / 2
        self._draw.ellipse((u - r, v - r, u + r, v + r), fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        turn = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        self.polygon([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turn], colour)

    def line(self, points: Points, width: float, colour: Colour) -> None:
        pixels = round(width * self._zoom * _CANVAS / 2)
        self._draw.line([self._place(*point) for point in points], fill=colour, width=pixels, joint="curve")

    def picture(self) -> np.ndarray:
        return np.asarray(self._image.reduce(_OVERSAMPLE))


def _rgb(name: str, rng: np.random.Generator) -> Colour:
    r, g, b = _jitter(name, rng)
    return int(r), int(g), int(b)


# --- aircraft -----------------------------------------------------------------------------------------------------

WINGS: dict[str, Points] = {  # right wing, nose at the top; the maker's name stands for the shape
    "merlin": [(0.0, -0.18), (0.95, -0.18), (0.95, 0.14), (0.0, 0.14)],
    "falcon": [(0.0, -0.32), (0.95, 0.3), (0.95, 0.62), (0.0, 0.16)],
    "vulcan": [(0.0, -0.62), (0.92, 0.58), (0.0, 0.58)],
}
_WING_LINE = {"merlin": (0.0, -0.02), "falcon": (0.66, -0.08), "vulcan": (0.6, 0.12)}  # y = slope · |x| + intercept
ENGINES = {1: (0.0,), 2: (-0.5, 0.5), 3: (-0.5, 0.0, 0.5), 4: (-0.72, -0.36, 0.36, 0.72)}
_BODIES = ("white", "yellow", "sky")
_SKIES = ("blue", "purple", "green", "red")


def aircraft(maker: str, engines: int, rng: np.random.Generator, colours: tuple[str, str]) -> np.ndarray:
    """An aircraft from above: the maker tells the wing, dark discs on it are the engines to be counted."""
    pen = Pen(
        _rgb(colours[1], rng),
        angle=rng.uniform(-0.4, 0.4),
        shift=(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)),
        zoom=rng.uniform(0.8, 1.0),
    )
    body, dark = _rgb(colours[0], rng), _rgb("black", rng)
    for side in (-1, 1):
        pen.polygon([(side * x, y) for x, y in WINGS[maker]], body)
        pen.polygon([(0, 0.66), (side * 0.36, 0.9), (side * 0.36, 0.98), (0, 0.92)], body)
    pen.ellipse(0, 0.05, 0.14, 0.9, body)
    slope, intercept = _WING_LINE[maker]
    for x in ENGINES[engines]:
        pen.disc(x, slope * abs(x) + intercept if x else -0.3, 0.14, dark)
    return pen.picture()


def pick_aircraft_colours(rng: np.random.Generator) -> tuple[str, str]:
    """Names of a body and a sky colour."""
    return str(rng.choice(_BODIES)), str(rng.choice(_SKIES))


# --- everything else ----------------------------------------------------------------------------------------------


def _star(points: int, inner: float) -> Points:
    corners = []
    for i in range(2 * points):
        radius, turn = (0.85 if i % 2 == 0 else inner), math.pi * i / points
        corners.append((radius * math.sin(turn), -radius * math.cos(turn)))
    return corners


def _ball(pen: Pen, a: Colour, b: Colour) -> None:
    pen.disc(0, 0, 0.7, a)


def _box(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.6, -0.6), (0.6, -0.6), (0.6, 0.6), (-0.6, 0.6)], a)


def _house(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.6, -0.1), (0.6, -0.1), (0.6, 0.8), (-0.6, 0.8)], a)
    pen.polygon([(-0.8, -0.1), (0, -0.8), (0.8, -0.1)], b)


def _tree(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.12, 0.1), (0.12, 0.1), (0.12, 0.9), (-0.12, 0.9)], b)
    pen.disc(0, -0.25, 0.6, a)


def _cloud(pen: Pen, a: Colour, b: Colour) -> None:
    for x, r in ((-0.45, 0.35), (0.0, 0.48), (0.45, 0.35)):
        pen.disc(x, 0.1 - r / 3, r, a)


def _sun(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon(_star(8, 0.5), a)
    pen.disc(0, 0, 0.42, b)


def _moon(pen: Pen, a: Colour, b: Colour) -> None:
    turn = np.linspace(-2.2, 2.2, 20)
    outer = [(-0.75 * math.cos(t) + 0.1, 0.75 * math.sin(t)) for t in turn]
    inner = [(-0.5 * math.cos(t) + 0.35, 0.62 * math.sin(t)) for t in turn[::-1]]
    pen.polygon(outer + inner, a)


def _starfish(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon(_star(5, 0.36), a)


def _flower(pen: Pen, a: Colour, b: Colour) -> None:
    for i in range(6):
        turn = math.pi * i / 3
        pen.disc(0.48 * math.sin(turn), 0.48 * math.cos(turn), 0.32, a)
    pen.disc(0, 0, 0.26, b)


def _fish(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(0.3, 0), (0.9, -0.5), (0.9, 0.5)], a)
    pen.ellipse(-0.15, 0, 0.65, 0.42, a)
    pen.disc(-0.5, -0.08, 0.09, b)


def _boat(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.85, 0.3), (0.85, 0.3), (0.5, 0.75), (-0.5, 0.75)], a)
    pen.polygon([(-0.05, 0.2), (-0.05, -0.85), (0.6, 0.2)], b)


def _car(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.9, 0), (0.9, 0), (0.9, 0.4), (-0.9, 0.4)], a)
    pen.polygon([(-0.55, 0), (-0.35, -0.4), (0.35, -0.4), (0.55, 0)], a)
    for x in (-0.5, 0.5):
        pen.disc(x, 0.42, 0.22, b)


def _mug(pen: Pen, a: Colour, b: Colour) -> None:
    pen.disc(0.5, 0.05, 0.38, a)
    pen.disc(0.5, 0.05, 0.2, b)
    pen.polygon([(-0.6, -0.6), (0.45, -0.6), (0.45, 0.7), (-0.6, 0.7)], a)


def _key(pen: Pen, a: Colour, b: Colour) -> None:
    pen.line([(-0.2, 0), (0.85, 0)], 0.18, a)
    pen.line([(0.7, 0), (0.7, 0.35)], 0.16, a)
    pen.disc(-0.5, 0, 0.38, a)
    pen.disc(-0.5, 0, 0.16, b)


def _heart(pen: Pen, a: Colour, b: Colour) -> None:
    for x in (-0.36, 0.36):
        pen.disc(x, -0.25, 0.41, a)
    pen.polygon([(-0.74, -0.1), (0.74, -0.1), (0, 0.85)], a)


def _arrow(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.8, -0.2), (0.1, -0.2), (0.1, 0.2), (-0.8, 0.2)], a)
    pen.polygon([(0.1, -0.6), (0.85, 0), (0.1, 0.6)], a)


def _ladder(pen: Pen, a: Colour, b: Colour) -> None:
    for x in (-0.4, 0.4):
        pen.line([(x, -0.95), (x, 0.95)], 0.14, a)
    for y in (-0.6, -0.2, 0.2, 0.6):
        pen.line([(-0.4, y), (0.4, y)], 0.12, a)


def _mushroom(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.2, 0), (0.2, 0), (0.28, 0.8), (-0.28, 0.8)], b)
    pen.polygon([(0.8 * math.cos(t), -0.75 * math.sin(t) + 0.05) for t in np.linspace(0, math.pi, 16)], a)


def _umbrella(pen: Pen, a: Colour, b: Colour) -> None:
    pen.line([(0, 0), (0, 0.8)], 0.12, b)
    pen.polygon([(0.85 * math.cos(t), -0.8 * math.sin(t)) for t in np.linspace(0, math.pi, 16)], a)


def _flag(pen: Pen, a: Colour, b: Colour) -> None:
    pen.line([(-0.6, -0.85), (-0.6, 0.9)], 0.12, b)
    pen.polygon([(-0.55, -0.8), (0.8, -0.8), (0.8, 0.05), (-0.55, 0.05)], a)


def _bird(pen: Pen, a: Colour, b: Colour) -> None:
    pen.line([(-0.85, -0.3), (-0.4, -0.45), (0, 0.05), (0.4, -0.45), (0.85, -0.3)], 0.2, a)


def _apple(pen: Pen, a: Colour, b: Colour) -> None:
    pen.line([(0, -0.3), (0.12, -0.8)], 0.12, b)
    for x in (-0.22, 0.22):
        pen.disc(x, 0.1, 0.5, a)


def _mountain(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-1.2, 0.8), (-0.2, -0.75), (0.9, 0.8)], a)
    pen.polygon([(-0.42, -0.4), (-0.2, -0.75), (0.04, -0.4)], b)
    pen.polygon([(0.1, 0.8), (0.7, -0.1), (1.3, 0.8)], a)


def _table(pen: Pen, a: Colour, b: Colour) -> None:
    pen.polygon([(-0.85, -0.3), (0.85, -0.3), (0.85, -0.05), (-0.85, -0.05)], a)
    for x in (-0.65, 0.65):
        pen.line([(x, -0.1), (x, 0.8)], 0.14, a)


THINGS: dict[str, Callable[[Pen, Colour, Colour], None]] = {
    "ball": _ball,
    "box": _box,
    "house": _house,
    "tree": _tree,
    "cloud": _cloud,
    "sun": _sun,
    "moon": _moon,
    "starfish": _starfish,
    "flower": _flower,
    "fish": _fish,
    "boat": _boat,
    "car": _car,
    "mug": _mug,
    "key": _key,
    "heart": _heart,
    "arrow": _arrow,
    "ladder": _ladder,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
    "flag": _flag,
    "bird": _bird,
    "apple": _apple,
    "mountain": _mountain,
    "table": _table,
}


def thing(name: str, rng: np.random.Generator, colours: tuple[str, str]) -> np.ndarray:
    """One of `THINGS`, small turns and shifts, in two colours and sometimes a third."""
    pen = Pen(
        _rgb(colours[1], rng),
        angle=rng.uniform(-0.25, 0.25),
        shift=(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)),
        zoom=rng.uniform(0.75, 1.0),
    )
    third = "white" if colours[1] in DARK else "black"
    THINGS[name](pen, _rgb(colours[0], rng), _rgb(third, rng))
    return pen.picture()
