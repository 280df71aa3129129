"""Draw on an SVG canvas, measured in pixels from its upper left corner, in one style for all charts.

Text stays text, in the reader's own sans serif. Its width is therefore unknown, so leave room after a text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 900

# By role, so that a page which holds the figure can give each another colour in the dark. Colour-blind readers can
# tell them apart.
COLOURS = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "quiet": "#59636e",
    "reference": "#8c959f",
    "rule": "#e1e4e8",
    "average": "#80868f",
    "overlap": "#0072b2",
    "ties": "#d55e00",
}

# The same by role for a dark page.
DARK = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "quiet": "#9198a1",
    "reference": "#6e7681",
    "rule": "#30363d",
    "average": "#9aa3ad",
    "overlap": "#56b4e9",
    "ties": "#f0903f",
}

STYLE: Any = {  # matplotlib's own type would list all of its settings
    "font.family": "DejaVu Sans",  # only to measure with: matplotlib brings it along
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.75,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelcolor": COLOURS["quiet"],
    "ytick.labelcolor": COLOURS["quiet"],
    "svg.fonttype": "none",
    "svg.hashsalt": "modular-experts",  # otherwise ids are random
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# What matplotlib writes that a page does not need; it names the font, and a rotation by nothing, with every text.
LEFT_OUT = [
    r"<!DOCTYPE.*?>\s*",
    r"<metadata>.*?</metadata>\s*",
    r"<!--.*?-->\s*",
    r" font-family: 'DejaVu Sans';",
    r' transform="rotate\(-0 [^"]*"',
]
PIXEL = 0.75  # in points, in which matplotlib measures


def check_drawing() -> None:
    """Raise where no figure could be drawn; call it before a long run.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib; pip install 'modular-experts[report]' brings it")


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of this package, whatever the user's matplotlibrc sets."""
    check_drawing()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


class Canvas:
    """A canvas `width` by `height` pixels; make it and draw on it inside of `with style():`."""

    def __init__(self, height: float, width: float = WIDTH) -> None:
        from matplotlib.figure import Figure

        self.height, self.width = height, width
        self.figure = Figure(figsize=(width * PIXEL / 72, height * PIXEL / 72), facecolor=COLOURS["paper"])

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes on a part of the canvas."""
        bottom = 1 - (top + height) / self.height
        return self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, size: float = 12, colour: str = "ink", **style: Any) -> None:
        """Write a text whose baseline starts at a point."""
        place: dict[str, Any] = {"va": "baseline", "fontsize": size * PIXEL, "color": COLOURS[colour]}
        self.figure.text(x / self.width, 1 - y / self.height, text, **(place | style))

    def mark(self, x: float, y: float, marker: str, colour: str = "quiet", **style: Any) -> None:
        """Put one mark on the canvas, as a legend needs it."""
        from matplotlib.lines import Line2D

        place: dict[str, Any] = {"transform": self.figure.transFigure, "linestyle": "none", "marker": marker}
        line = Line2D([x / self.width], [1 - y / self.height], color=COLOURS[colour], **(place | style))
        self.figure.add_artist(line)

    def svg(self, title: str, text: str, dark: bool = False) -> str:
        """Return the canvas as SVG without links and dates: the same drawing gives the same bytes."""
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(stream, format="svg", metadata=nothing, facecolor=COLOURS["paper"])
        drawn = re.sub("|".join(LEFT_OUT), "", stream.getvalue(), flags=re.DOTALL)
        for role, colour in COLOURS.items() if dark else ():
            drawn = drawn.replace(colour, DARK[role])
        about = f'role="img" aria-labelledby="figure-title figure-text" font-family="{FONTS}" '
        names = f'<title id="figure-title">{title}</title>\n <desc id="figure-text">{text}</desc>'
        return re.sub(r"<svg ([^>]*)>", lambda tag: f"<svg {about}{tag[1]}>\n {names}", drawn, count=1)
