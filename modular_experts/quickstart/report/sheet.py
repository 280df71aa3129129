"""Sheet: a white SVG page measured in pixels from its upper left corner, with the look that all panels share.

Text stays text, in the sans serif of whoever reads it; so is its width, and nothing may stand close to the end of a
text. What is drawn is decided in `panels.py`.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "STYLE", "WIDTH", "Sheet"]

WIDTH = 900

# By role, so that a page which holds the figure can give them others in the dark. Told apart by colour-blind readers.
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
POINTS = 0.75  # of a pixel


class Sheet:
    """A page of `WIDTH` pixels; made while `STYLE` holds.

    Args:
        height: Pixels.
    """

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH * POINTS / 72, height * POINTS / 72), facecolor=COLOURS["paper"])

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes on a part of the page."""
        bottom = 1 - (top + height) / self.height
        return self.figure.add_axes((left / WIDTH, bottom, width / WIDTH, height / self.height))

    def text(self, x: float, y: float, text: str, size: float = 12, colour: str = "ink", **style: Any) -> None:
        """Write a text whose baseline starts at a point."""
        place: dict[str, Any] = {"va": "baseline", "fontsize": size * POINTS, "color": COLOURS[colour]}
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **(place | style))

    def mark(self, x: float, y: float, marker: str, colour: str = "quiet", **style: Any) -> None:
        """Put one mark on the page, as a key needs it."""
        from matplotlib.lines import Line2D

        place: dict[str, Any] = {"transform": self.figure.transFigure, "linestyle": "none", "marker": marker}
        line = Line2D([x / WIDTH], [1 - y / self.height], color=COLOURS[colour], **(place | style))
        self.figure.add_artist(line)

    def svg(self, title: str, text: str) -> str:
        """Return the page as SVG that names no other file and no date.

        Args:
            title: What the figure is called, for those who cannot see it.
            text: What it shows.
        """
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(stream, format="svg", metadata=nothing, facecolor=COLOURS["paper"])
        drawn = re.sub(r"<!DOCTYPE.*?>\s*", "", stream.getvalue(), flags=re.DOTALL).replace("'DejaVu Sans'", FONTS)
        about = 'role="img" aria-labelledby="figure-title figure-text" '
        names = f'<title id="figure-title">{title}</title>\n <desc id="figure-text">{text}</desc>'
        return re.sub(r"<svg ([^>]*)>", lambda tag: f"<svg {about}{tag[1]}>\n {names}", drawn, count=1)
