"""How every figure is drawn: colours, type, canvas, and SVG bytes that depend on nothing but the content.

Equal input gives equal bytes on one version of matplotlib: no dates, a fixed salt for element names, no window system. Colours
are those of Okabe and Ito, told apart by the colour-blind; every source also has a marker of its own. Sources are many and colours
few: what a source has by its name is changed where another one of the run has it, too (`styled`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from retrieve_or_generate.report.escaping import shortened, visible
from retrieve_or_generate.report.tables import SOURCES, in_order

INK, MUTED, RULE = "#1d2329", "#5c6670", "#dfe3e8"
_COLOURS = dict(zip(SOURCES, ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#5c6670"), strict=True))
_MARKERS = dict(zip(SOURCES, ("o", "s", "^", "D", ""), strict=True))
_OTHER_COLOURS = ("#e69f00", "#56b4e9", "#882255", "#999933", "#cc79a7", "#332288", "#44aa99")
_OTHER_MARKERS = ("D", "P", "X", "p", "h")
_LABEL, _MIXED_LABEL = 14, 12
"""Most characters of a label; beside a panel a mixture's is the widest of letters."""
_STRENGTHS = matplotlib.colormaps["Greens"]
_PAGE_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
_STYLE = {
    "svg.hashsalt": "rog",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its file name without `.svg`, the bytes, and its content in words for those who cannot see it."""

    name: str
    svg: bytes
    words: str


@dataclass(frozen=True)
class _Look:
    """What a source is drawn with."""

    colour: str
    marker: str
    label: str


_LOOKS: ContextVar[Mapping[str, _Look]] = ContextVar("_LOOKS", default={})  # noqa: B039 (never written to)


def colour_of(source: str) -> str:
    """A source's own; one of several of a kind has a colour of its name, or of its strength, darker the larger."""
    return _look(source).colour


def marker_of(source: str) -> str:
    """Its kind's; one of several mixtures, which may have one colour, has a marker of its name."""
    return _look(source).marker


def label_of(source: str) -> str:
    """The source's name where room is scarce."""
    return _look(source).label


def _look(source: str) -> _Look:
    """The one of the run that is drawn; of any other source what follows from its name."""
    return _LOOKS.get().get(source) or _look_by_name(source)


def _look_by_name(source: str) -> _Look:
    kind, _, name = source.partition("-")
    strength, number = strength_of(source), sum(source.encode())
    colour = _COLOURS.get(source, _OTHER_COLOURS[number % len(_OTHER_COLOURS)])
    marker, label = _MARKERS.get(kind, "v"), "off the shelf" if source == "none" else shortened(name or source, _LABEL)
    if strength is not None:
        colour, label = to_hex(_STRENGTHS(0.3 + 0.6 * min(strength, 1.0))), f"strength {name}"
    if kind == "mixed" and name:
        marker = _OTHER_MARKERS[number // len(_OTHER_COLOURS) % len(_OTHER_MARKERS)]
        label = shortened(f"mixed {name}", _MIXED_LABEL)
    return _Look(colour, marker, label)


def _looks(sources: Iterable[str]) -> dict[str, _Look]:
    """Of each source: by its name, but no label twice, and no colour while another one is left, or marker of that colour."""
    looks: dict[str, _Look] = {}
    for source in in_order(sources):
        by_name, taken = _look_by_name(source), looks.values()
        labels, colours = {look.label for look in taken}, {look.colour for look in taken}
        pairs = {(look.colour, look.marker) for look in taken}
        own = by_name.colour, by_name.marker
        others = [(colour, marker) for marker in (own[1], *_OTHER_MARKERS) for colour in _OTHER_COLOURS]
        free = [pair for pair in [own, *others] if pair not in pairs] or [own]
        colour, marker = next((pair for pair in free if pair[0] not in colours), free[0])
        label = next(label for label in _labels(by_name.label, source) if label not in labels)
        looks[source] = _Look(colour, marker, label)
    return looks


def _labels(label: str, source: str) -> Iterator[str]:
    """Shorter and shorter of what tells it apart: its whole name, the end of that, a number."""
    yield label
    if len(shown := visible(source)) <= _LABEL:
        yield shown
    yield f"…{shown[2 - _MIXED_LABEL :]}"
    yield from (f"{label[: _MIXED_LABEL - 4]}… {number}" for number in count(2))


def strength_of(source: str) -> float | None:
    """0.4 of `perturbed-0.4`."""
    kind, _, name = source.partition("-")
    try:
        return float(name) if kind == "perturbed" else None
    except ValueError:
        return None


def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of CSS pixels (96 to the inch) and its (rows, columns) axes."""
    figure = Figure(figsize=(width / 96, height / 96), dpi=96)
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def svg_of(figure: Figure, background: str = "none") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # class names in any script
        figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace(b"'DejaVu Sans'", _PAGE_FONTS.encode())


@contextmanager
def styled(sources: Iterable[str] = ()) -> Iterator[None]:
    """The context in which figures must be drawn and saved; a user's own matplotlibrc does not reach into it.

    `sources` are those of the run, each of which then has a label, and a colour with a marker, of its own.
    """
    token = _LOOKS.set(_looks(sources))
    try:
        with matplotlib.style.context(["default", _STYLE]):
            yield
    finally:
        _LOOKS.reset(token)
