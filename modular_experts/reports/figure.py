"""Draw values between 0 and 1 as SVG: a mark on a line for each model, in panels that share their rows."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from modular_experts.reports.tables import percent

# In pixels.
WIDTH = 900.0  # of a wide picture
NARROW = 390.0  # of one for a phone
ROW = 18  # of a row
GAP = 10  # between groups
HEAD = 58  # of a panel's title and references
NAMES = 148.0  # beside a panel for the names of rows, at least
NUMBERS = 66.0  # and for their values
LETTER = 7.0  # pixels of a letter of a long name

# A page sets the colours itself.
LIGHT = "--paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --reference: #8c959f; --rule: #e1e4e8; --accent: #0072b2; "
DARK = "--paper: #0d1117; --ink: #e6edf3; --quiet: #9198a1; --reference: #6e7681; --rule: #30363d; --accent: #56b4e9; "
LOOK = """
.dots { background: var(--paper); }
.dots text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.dots .strong { font-weight: 650; } .dots .title { font-size: 15px; font-weight: 650; }
.dots .quiet { fill: var(--quiet); } .dots .end { text-anchor: end; } .dots .middle { text-anchor: middle; }
.dots .rule { stroke: var(--rule); } .dots .reference { stroke: var(--reference); stroke-dasharray: 2 2; }
.dots .bar { stroke: var(--ink); stroke-width: 2.5; } .dots .step { stroke: var(--accent); stroke-width: 1.5; }
.dots circle { stroke: var(--accent); stroke-width: 1.5; fill: var(--accent); } .dots .before { fill: var(--paper); }
"""


@dataclass(frozen=True)
class MarkedRow:
    """A row of a panel: its value is a filled mark, and a hollow one where it was before; a head has a bar."""

    name: str
    value: float | None
    before: float | None = None
    head: bool = False


@dataclass(frozen=True)
class Panel:
    """Rows in groups under a title, and values for all of them as dotted lines, by name."""

    title: str
    groups: Sequence[Sequence[MarkedRow]]
    references: Mapping[str, float]

    @property
    def height(self) -> int:
        """Pixels of the panel."""
        return HEAD + sum(ROW * len(group) + GAP for group in self.groups) + 24

    def draw(self, left: float, top: float, width: float, names: float) -> list[str]:
        """Return the elements of the panel, whose axis begins at `left`; names of rows have `names` pixels or none."""

        def x(value: float) -> float:
            return round(left + width * value, 1)

        first = top + HEAD
        last = top + self.height - 24
        drawn = [text_of(left, top + 4, self.title, "strong")]
        for place in (0.0, 0.25, 0.5, 0.75, 1.0):
            label = f"{100 * place:g} %" if place == 1 else f"{100 * place:g}"
            drawn += [line_of(x(place), first, x(place), last, "rule")]
            drawn += [text_of(x(place), last + 16, label, "quiet middle")]
        # The further right a reference, the higher its name, so that no line crosses a name.
        for step, (name, value) in enumerate(sorted(self.references.items(), key=lambda item: item[1])):
            over = first - 6 - 14 * step
            drawn += [line_of(x(value), over - 8, x(value), last, "reference")]
            label = f"{name} {percent(value)}"
            if value > 0.5:
                drawn += [text_of(x(value) - 4, over, label, "quiet end")]
            else:
                drawn += [text_of(x(value) + 4, over, label, "quiet")]
        y = first + ROW / 2 + 2
        for group in self.groups:
            for row in group:
                if names:
                    drawn += [text_of(left - names + 4, y + 4, row.name, "strong" if row.head else "")]
                if row.value is not None:
                    drawn += _marks(row, x, y)
                    drawn += [text_of(x(1) + 8, y + 4, percent(row.value))]
                y += ROW
            y += GAP
        return drawn


def draw_panels(title: str, key: str, panels: Sequence[Panel], wide: bool = True, dark: bool | None = None) -> str:
    """Draw panels that share their rows as SVG, beside each other, or for a phone (not `wide`) below each other.

    `key` says what the marks mean. `dark` sets the colours of a dark or a light page; None leaves them to the page.
    """
    elements: list[str] = []
    top = 18.0
    for words, letters, look in ((title, 100 if wide else 46, "title"), (key, 130 if wide else 58, "quiet")):
        for line in textwrap.wrap(words, letters):
            elements.append(text_of(4, top, line, look))
            top += 18
    top += 12
    width = WIDTH if wide else NARROW
    longest = max((len(row.name) for panel in panels for group in panel.groups for row in group), default=0)
    names = left = max(NAMES, LETTER * longest)
    beside = max(1, len(panels)) if wide else 1
    room = (width - names - NUMBERS * beside) / beside
    for number, panel in enumerate(panels):
        elements += panel.draw(left, top, room, 0 if wide and number else names)
        if wide:
            left += room + NUMBERS
        else:
            top += panel.height + 16
    height = top + panels[0].height if wide else top
    colours = "" if dark is None else f".dots {{ {DARK if dark else LIGHT}}}"
    about = f'xmlns="http://www.w3.org/2000/svg" class="dots" role="img" aria-label="{escape(title)}"'
    style = f"<style>{LOOK}{colours}</style>"
    return f'<svg {about} viewBox="0 0 {width:g} {height:g}">{style}{"".join(elements)}</svg>\n'


def _marks(row: MarkedRow, x: Callable[[float], float], y: float) -> list[str]:
    assert row.value is not None
    if row.head:
        return [line_of(x(row.value), y - 7, x(row.value), y + 7, "bar")]
    mark = f'<circle cx="{x(row.value)}" cy="{y:g}" r="4" />'
    if row.before is None:
        return [mark]
    hollow = f'<circle cx="{x(row.before)}" cy="{y:g}" r="3.5" class="before" />'
    return [line_of(x(row.before), y, x(row.value), y, "step"), hollow, mark]


def line_of(x: float, y: float, to_x: float, to_y: float, look: str) -> str:
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" class="{look}" />'


def text_of(x: float, y: float, text: str, look: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{look}">{escape(text)}</text>'
