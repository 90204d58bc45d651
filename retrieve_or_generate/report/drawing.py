"""How every figure is drawn: colours, type, canvas, and SVG bytes that depend on nothing but the content.

Equal input gives equal bytes on one version of matplotlib: no dates, a fixed salt for element names, no window system. Colours
are those of Okabe and Ito, told apart by the colour-blind; every source also has a marker of its own.
"""

from __future__ import annotations

import io
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from retrieve_or_generate.report.escaping import shortened
from retrieve_or_generate.report.tables import SOURCES

INK, MUTED, RULE = "#1d2329", "#5c6670", "#dfe3e8"
_COLOURS = dict(zip(SOURCES, ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#5c6670"), strict=True))
_MARKERS = dict(zip(SOURCES, ("o", "s", "^", "D", ""), strict=True))
_OTHER_COLOURS = ("#e69f00", "#56b4e9", "#882255", "#999933")
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
    return _COLOURS.get(source, _OTHER_COLOURS[sum(source.encode()) % len(_OTHER_COLOURS)])


def marker_of(source: str) -> str:
    return _MARKERS.get(source, "v")


def label_of(source: str) -> str:
    """The source's name where room is scarce."""
    return "off the shelf" if source == "none" else shortened(source, 11)


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
