"""How every figure is drawn: colours, type, canvas, and SVG bytes that depend on nothing but the content.

Equal input gives equal bytes on one version of matplotlib: no dates, a fixed salt for element names, no window system. Colours
are those of Okabe and Ito, told apart by the colour-blind; every source also has a marker of its own.
"""

from __future__ import annotations

import io
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from retrieve_or_generate.report.escaping import shortened
from retrieve_or_generate.report.tables import SOURCES

INK, MUTED, RULE = "#1d2329", "#5c6670", "#dfe3e8"
_COLOURS = dict(zip(SOURCES, ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#5c6670"), strict=True))
_MARKERS = dict(zip(SOURCES, ("o", "s", "^", "D", ""), strict=True))
_OTHER_COLOURS = ("#e69f00", "#56b4e9", "#882255", "#999933", "#cc79a7", "#332288", "#44aa99")
_MIXED_MARKERS = ("D", "P", "X", "p", "h")
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


def colour_of(source: str) -> str:
    """A source's own; one of several of a kind has a colour of its name, or of its strength, darker the larger."""
    strength = strength_of(source)
    if strength is not None:
        return to_hex(_STRENGTHS(0.3 + 0.6 * min(strength, 1.0)))
    return _COLOURS.get(source, _OTHER_COLOURS[sum(source.encode()) % len(_OTHER_COLOURS)])


def marker_of(source: str) -> str:
    """Its kind's; one of several mixtures, which may have one colour, has a marker of its name."""
    if source.startswith("mixed-"):
        return _MIXED_MARKERS[sum(source.encode()) // len(_OTHER_COLOURS) % len(_MIXED_MARKERS)]
    return _MARKERS.get(source.partition("-")[0], "v")


def label_of(source: str) -> str:
    """The source's name where room is scarce."""
    name = source.partition("-")[2]
    if strength_of(source) is not None:
        return f"strength {name}"
    if source.startswith("mixed-"):
        return shortened(f"mixed {name}", 12)
    return "off the shelf" if source == "none" else shortened(name or source, 14)


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


def styled() -> AbstractContextManager[None]:
    """The context in which figures must be drawn and saved; a user's own matplotlibrc does not reach into it."""
    context: AbstractContextManager[None] = matplotlib.style.context(["default", _STYLE])
    return context
