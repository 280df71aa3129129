"""Figure: what merging does, as one SVG that needs nothing else. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modular_experts.quickstart.report.panels import TogetherPanel, WayPanel
from modular_experts.quickstart.report.reading import Reading
from modular_experts.quickstart.report.sheet import STYLE, Sheet

__all__ = ["check_drawing", "draw"]

TITLE = "Single experts and their merges"
TEXT = "Exact match on test words, held in and held out, and against the number of merged experts."
MARGIN = 32  # pixels above and between the panels


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Draw the figure of a run.

    Args:
        results: What `results.json` of a complete run holds.
        file: The SVG to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_drawing()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc changes nothing
        matplotlib.rcParams.update(STYLE)
        file.write_text(_drawn(Reading(results)), encoding="utf-8")


def check_drawing() -> None:
    """Refuse to go on where no figure could be drawn; for the beginning of a long run.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib; pip install 'modular-experts[report]' brings it")


def _drawn(reading: Reading) -> str:
    together = TogetherPanel(reading, MARGIN)
    way = WayPanel(reading, MARGIN + together.height + MARGIN)
    sheet = Sheet(way.top + way.height)
    together.draw(sheet)
    way.draw(sheet)
    return sheet.svg(TITLE, TEXT)
