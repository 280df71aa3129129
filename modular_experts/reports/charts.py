"""Charts of merges: how far a step moves each of many values, and how values change with a count.

A chart takes its numbers as plain values, and draws itself at a height of a canvas. `draw` stacks charts in a file.
Everything drawn has an id in the SVG, so that a test or a page can find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modular_experts.reports.svg import COLOURS, PIXEL, WIDTH, Canvas, style
from modular_experts.reports.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Chart", "Course", "Courses", "Key", "Look", "Side", "StepGroup", "StepRow", "Steps", "draw"]

MARGIN = 32  # pixels above and between the charts
SHARES, SHARE_NAMES = [0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"]
DOTTED: dict[str, Any] = {"color": COLOURS["reference"], "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}


@dataclass(frozen=True)
class Look:
    """How a series looks: a colour of `COLOURS`, and a marker of matplotlib."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a mark at `x` pixels (none without a marker), and a text after it.

    Args:
        x: Pixels from the left edge; they are given because the width of a text is unknown.
        text: The text.
        marker: A marker of matplotlib.
        colour: Of the mark.
        ink: Of the text.
        style: Further properties of the mark.
    """

    x: float
    text: str
    marker: str = ""
    colour: str = "quiet"
    ink: str = "quiet"
    style: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRow:
    """A value before and after a step, on each side: an open mark, a filled mark, and a line between them."""

    id: str
    name: str
    look: Look
    values: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class StepGroup:
    """Rows under one title, and beside them on the first side the value that all of them start from."""

    id: str
    name: str
    rows: Sequence[StepRow]
    start: float


@dataclass(frozen=True)
class Side:
    """One of the charts that share their rows: its place in pixels, and reference lines by id with name and value."""

    id: str
    title: str
    left: float
    width: float
    references: Mapping[str, tuple[str, float]]


class Steps:
    """Rows of values between 0 and 1 before and after a step, in groups, on one or more sides.

    Args:
        title: The headline.
        sides: The charts beside each other.
        groups: The rows.
        key: The legend.
    """

    ROW, GAP, HEAD = 18, 12, 122

    def __init__(self, title: str, sides: Sequence[Side], groups: Sequence[StepGroup], key: Sequence[Key]) -> None:
        self.title, self.sides, self.groups, self.key = title, sides, groups, key
        self.places: dict[str, float] = {}  # of groups and rows by id, in pixels under the head
        y = self.ROW / 2
        for group in groups:
            self.places[group.id] = y
            for row in group.rows:
                y += self.ROW
                self.places[row.id] = y
            y += self.ROW + self.GAP
        self.body = y - self.GAP - 2
        self.height = self.HEAD + self.body + 22

    def draw(self, canvas: Canvas, top: float) -> None:
        """Draw the chart from `top` pixels downwards."""
        canvas.text(16, top, self.title, 15, weight="bold")
        draw_key(canvas, self.key, top + 24)
        body = top + self.HEAD
        for group in self.groups:
            canvas.text(16, body + self.places[group.id] + 4, group.name, weight="bold")
        for row in [row for group in self.groups for row in group.rows]:
            canvas.text(16, body + self.places[row.id] + 4, row.name, 12, row.look.colour)
        for side in self.sides:
            canvas.text(side.left, top + 58, side.title, weight="bold")
            axes = canvas.axes(side.left, body, side.width, self.body)
            axes.set(xlim=(0, 1), ylim=(self.body, 0), yticks=[])
            axes.set_xticks(SHARES, SHARE_NAMES, fontsize=11 * PIXEL)
            axes.grid(axis="x")
            self._references(axes, side)
            for group in self.groups:
                for row in group.rows:
                    self._row(axes, side, row)
            if side is self.sides[0]:
                self._starts(axes)

    def _references(self, axes: Axes, side: Side) -> None:
        """Draw a line for each reference; the further right, the higher its name, so that no line crosses a name."""
        order = sorted(side.references.items(), key=lambda item: item[1][1])
        for step, (name, (text, value)) in enumerate(order):
            top = -8 - 14 * step
            axes.plot([value, value], [self.body, top - 6], **DOTTED, clip_on=False, gid=f"{side.id}-{name}")
            beside(axes, f"{text} {percent(value)}", value, top, -4 if value > 0.5 else 4)

    def _row(self, axes: Axes, side: Side, row: StepRow) -> None:
        y, colour, (before, after) = self.places[row.id], COLOURS[row.look.colour], row.values[side.id]
        mark: dict[str, Any] = {"color": colour, "marker": row.look.marker, "linestyle": "none"}
        mark |= {"clip_on": False, "zorder": 3}
        name = f"{side.id}-{row.id}"
        axes.plot([before, after], [y, y], color=colour, linewidth=1.25, zorder=2)
        axes.plot([before], [y], **mark, markersize=5, markerfacecolor=COLOURS["paper"], gid=f"{name}-default")
        axes.plot([after], [y], **mark, markersize=6.5, gid=f"{name}-chosen")
        beside(axes, percent(after), 1, y + 4, 8, color=colour)

    def _starts(self, axes: Axes) -> None:
        for group in self.groups:
            first, last = self.places[group.id], self.places[group.id] + self.ROW * len(group.rows)
            place = [first + self.ROW / 2, last + self.ROW / 2]
            ink = COLOURS["ink"]
            axes.plot([group.start] * 2, place, color=ink, linewidth=2.25, zorder=4, gid=f"single-{group.id}")
            box = {"boxstyle": "square,pad=0.15", "facecolor": COLOURS["paper"], "edgecolor": "none"}
            beside(axes, percent(group.start), group.start, first + 4, 0, color=ink, bbox=box, zorder=5)


@dataclass(frozen=True)
class Course:
    """A line over counts, by count; dotted, or solid with marks."""

    id: str
    look: Look
    values: Mapping[int, float]
    dotted: bool = False


@dataclass(frozen=True)
class Chart:
    """Courses that start from one value at count 1."""

    id: str
    title: str
    courses: Sequence[Course]
    start: float


class Courses:
    """How values between 0 and 1 change with a count, on a logarithmic axis: charts beside each other.

    Args:
        title: The headline.
        charts: The charts, over the same counts.
        references: Lines across every chart by id, with name and value; the first chart names them.
        axis: What is counted.
        key: The legend.
    """

    LEFT, SPACE, HEAD, TALL = 52, 24, 72, 180

    def __init__(
        self,
        title: str,
        charts: Sequence[Chart],
        references: Mapping[str, tuple[str, float]],
        axis: str,
        key: Sequence[Key],
    ) -> None:
        self.title, self.charts, self.references, self.axis, self.key = title, charts, references, axis, key
        self.height = self.HEAD + self.TALL + 50

    def draw(self, canvas: Canvas, top: float) -> None:
        """Draw the charts from `top` pixels downwards."""
        canvas.text(16, top, self.title, 15, weight="bold")
        draw_key(canvas, self.key, top + 24)
        width = (WIDTH - self.LEFT - 24 - self.SPACE * (len(self.charts) - 1)) / len(self.charts)
        for place, chart in enumerate(self.charts):
            left = self.LEFT + place * (width + self.SPACE)
            canvas.text(left, top + self.HEAD - 14, chart.title, weight="bold")
            axes = canvas.axes(left, top + self.HEAD, width, self.TALL)
            self._chart(axes, chart)
            if place == 0:
                axes.set_yticks(SHARES, SHARE_NAMES, fontsize=11 * PIXEL)
                for text, value in self.references.values():
                    # There is no room over a line near the top.
                    over = value + 0.017 if value < 0.9 else value - 0.068
                    beside(axes, text, axes.get_xlim()[1], over, -1)
        canvas.text(self.LEFT, top + self.HEAD + self.TALL + 38, self.axis, 11, "quiet")

    def _chart(self, axes: Axes, chart: Chart) -> None:
        counts = [1, *chart.courses[0].values]
        axes.set(xscale="log", xlim=(0.88, counts[-1] * 1.14), ylim=(0, 1))
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=11 * PIXEL)
        axes.set_yticks(SHARES, [""] * len(SHARES))
        axes.minorticks_off()
        axes.grid(axis="y")
        for name, (_, value) in self.references.items():
            axes.axhline(value, **DOTTED, gid=f"way-{chart.id}-{name}")
        for course in chart.courses:
            line: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (1, 1.4))}
            if not course.dotted:
                line = {"linewidth": 1.75, "marker": course.look.marker, "markersize": 5, "markevery": slice(1, None)}
            colour, gid = COLOURS[course.look.colour], f"way-{chart.id}-{course.id}"
            axes.plot(counts, [chart.start, *course.values.values()], color=colour, **line, zorder=3, gid=gid)
        axes.plot([1], [chart.start], "o", color=COLOURS["ink"], markersize=6, zorder=5)


def draw(charts: Sequence[Steps | Courses], file: str | Path, title: str, text: str) -> None:
    """Draw charts under each other as one SVG that needs no other file.

    Args:
        charts: What to draw, from the top downwards.
        file: The SVG to write.
        title: The figure's name, for readers who cannot see it.
        text: What it shows, for the same readers.

    Raises:
        ValueError: matplotlib is not installed.
    """
    with style():
        canvas = Canvas(sum(chart.height + MARGIN for chart in charts))
        top: float = MARGIN
        for chart in charts:
            chart.draw(canvas, top)
            top += chart.height + MARGIN
        Path(file).write_text(canvas.svg(title, text), encoding="utf-8")


def draw_key(canvas: Canvas, key: Sequence[Key], y: float) -> None:
    """Draw a legend on one line."""
    for entry in key:
        if entry.marker:
            canvas.mark(entry.x, y - 4, entry.marker, entry.colour, **entry.style)
        room = (8 if entry.marker == "|" else 10) if entry.marker else 0
        canvas.text(entry.x + room, y, entry.text, 12, entry.ink)


def beside(axes: Axes, text: str, x: float, y: float, shift: float, **more: Any) -> None:
    """Write a text `shift` pixels to the right of a point, to its left if negative, or centred on it if 0."""
    place: dict[str, Any] = {"xytext": (shift * PIXEL, 0), "textcoords": "offset points", "annotation_clip": False}
    side = "center" if shift == 0 else "left" if shift > 0 else "right"
    look: dict[str, Any] = {"ha": side, "va": "baseline", "fontsize": 11 * PIXEL, "color": COLOURS["quiet"]}
    axes.annotate(text, (x, y), **(place | look | more))
