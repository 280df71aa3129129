"""Draw charts of merges: how far a step moves each of many values, and how values change with a count.

A chart takes its numbers as plain values, and draws itself at a height of a canvas. `draw` stacks charts in a file.
Every mark has an id in the SVG, so that a test or a page can find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modular_experts.reports.svg import COLOURS, PIXEL, WIDTH, Canvas, style
from modular_experts.reports.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN, LINE = 32, 21  # pixels above and between the charts, and between lines of text
SHARES, SHARE_NAMES = [0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"]
DOTTED: dict[str, Any] = {"color": COLOURS["reference"], "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}


@dataclass(frozen=True)
class Look:
    """How a series looks: a colour of `COLOURS`, and a marker of matplotlib."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a mark (if it has a marker), and a text after it."""

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
    """Rows under one title, and beside them on the first side the value that all of them start from, if it has one."""

    id: str
    name: str
    rows: Sequence[StepRow]
    start: float | None


@dataclass(frozen=True)
class Side:
    """One of the charts that share their rows: its place in pixels, and reference lines by id with name and value."""

    id: str
    title: str
    left: float
    width: float
    references: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Steps:
    """Rows of values between 0 and 1 before and after a step, in groups, on one or more sides."""

    title: str  # of one or several lines, or of none
    measure: str
    sides: Sequence[Side]
    groups: Sequence[StepGroup]
    key: Sequence[Key]

    ROW, GAP, HEAD = 18, 12, 64  # the head is under the title and the legend

    @property
    def body(self) -> float:
        """Height of the rows in pixels."""
        return sum(self.ROW * (1 + len(group.rows)) + self.GAP for group in self.groups) + self.ROW / 2 - self.GAP - 2

    def height(self, width: float) -> float:
        """Return the height in pixels on a canvas of a width."""
        return title_height(self.title, self.measure, self.key, width) + self.HEAD + self.body + 22

    def draw(self, canvas: Canvas, top: float) -> None:
        """Draw the chart from `top` pixels downwards."""
        top = draw_title(canvas, top, self.title, self.measure, self.key)
        body = top + self.HEAD
        places: dict[str, float] = {}  # of groups and rows by id, in pixels under the head
        y = self.ROW / 2
        for group in self.groups:
            canvas.text(16, body + y + 4, group.name, weight="bold")
            names = [group.id, *[row.id for row in group.rows]]
            places |= {name: y + self.ROW * number for number, name in enumerate(names)}
            y += self.ROW * (1 + len(group.rows)) + self.GAP
        rows = [row for group in self.groups for row in group.rows]
        for row in rows:
            canvas.text(16, body + places[row.id] + 4, row.name, 12, row.look.colour)
        for side in self.sides:
            canvas.text(side.left, top + 16, side.title, weight="bold")
            axes = canvas.axes(side.left, body, side.width, self.body)
            axes.set(xlim=(0, 1), ylim=(self.body, 0), yticks=[])
            axes.set_xticks(SHARES, SHARE_NAMES, fontsize=11 * PIXEL)
            axes.grid(axis="x")
            # The further right a reference, the higher its name, so that no line crosses a name.
            for step, (name, (text, value)) in enumerate(sorted(side.references.items(), key=lambda item: item[1][1])):
                over = -8 - 14 * step
                axes.plot([value, value], [self.body, over - 6], **DOTTED, clip_on=False, gid=f"{side.id}-{name}")
                beside(axes, f"{text} {percent(value)}", value, over, -4 if value > 0.5 else 4)
            for row in rows:
                y, colour, (before, after) = places[row.id], COLOURS[row.look.colour], row.values[side.id]
                mark: dict[str, Any] = {"color": colour, "marker": row.look.marker, "linestyle": "none"}
                mark |= {"clip_on": False, "zorder": 3}
                name = f"{side.id}-{row.id}"
                axes.plot([before, after], [y, y], color=colour, linewidth=1.25, zorder=2)
                axes.plot([before], [y], **mark, markersize=5, markerfacecolor=COLOURS["paper"], gid=f"{name}-default")
                axes.plot([after], [y], **mark, markersize=6.5, gid=f"{name}-chosen")
                beside(axes, percent(after), 1, y + 4, 8, color=colour)
            for group in self.groups if side is self.sides[0] else []:
                if group.start is None:
                    continue
                first, ink = places[group.id], COLOURS["ink"]
                place = [first + self.ROW / 2, first + self.ROW * (len(group.rows) + 0.5)]
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


@dataclass(frozen=True)
class Courses:
    """How values between 0 and 1 change with a count, on a logarithmic axis: charts beside each other.

    `references` are lines across every chart by id, with name and value; the first chart names them.
    """

    title: str  # of one or several lines, or of none
    measure: str
    charts: Sequence[Chart]
    references: Mapping[str, tuple[str, float]]
    axis: str
    key: Sequence[Key]

    LEFT, SPACE, HEAD, TALL = 52, 24, 30, 180

    def height(self, width: float) -> float:
        """Return the height in pixels on a canvas of a width."""
        return title_height(self.title, self.measure, self.key, width) + self.HEAD + self.TALL + 50

    def draw(self, canvas: Canvas, top: float) -> None:
        """Draw the charts from `top` pixels downwards."""
        top = draw_title(canvas, top, self.title, self.measure, self.key)
        width = (canvas.width - self.LEFT - 24 - self.SPACE * (len(self.charts) - 1)) / len(self.charts)
        for place, chart in enumerate(self.charts):
            left, counts = self.LEFT + place * (width + self.SPACE), [1, *chart.courses[0].values]
            canvas.text(left, top + self.HEAD - 14, chart.title, weight="bold")
            axes = canvas.axes(left, top + self.HEAD, width, self.TALL)
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
                    line = {
                        "linewidth": 1.75,
                        "marker": course.look.marker,
                        "markersize": 5,
                        "markevery": slice(1, None),
                    }
                colour, gid = COLOURS[course.look.colour], f"way-{chart.id}-{course.id}"
                axes.plot(counts, [chart.start, *course.values.values()], color=colour, **line, zorder=3, gid=gid)
            axes.plot([1], [chart.start], "o", color=COLOURS["ink"], markersize=6, zorder=5)
            if place == 0:
                axes.set_yticks(SHARES, SHARE_NAMES, fontsize=11 * PIXEL)
                for text, value in self.references.values():
                    # There is no room over a line near the top.
                    over = value + 0.017 if value < 0.9 else value - 0.068
                    beside(axes, text, axes.get_xlim()[1], over, -1)
        canvas.text(self.LEFT, top + self.HEAD + self.TALL + 38, self.axis, 11, "quiet")


def draw(charts: Sequence[Steps | Courses], title: str, text: str, width: float = WIDTH, dark: bool = False) -> str:
    """Draw charts under each other as SVG, with a title and a text for readers who cannot see it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    with style():
        canvas = Canvas(sum(chart.height(width) + MARGIN for chart in charts), width)
        top: float = MARGIN
        for chart in charts:
            chart.draw(canvas, top)
            top += chart.height(width) + MARGIN
        return canvas.svg(title, text, dark)


def draw_title(canvas: Canvas, top: float, title: str, measure: str, key: Sequence[Key]) -> float:
    """Draw title, measure and legend, and return where the chart begins under them."""
    lines = title.splitlines()
    for number, line in enumerate(lines):
        canvas.text(16, top + LINE * number, line, 15, weight="bold")
    if measure:
        canvas.text(16, top + LINE * len(lines), measure, 12, "quiet")
    first = top + LINE * (len(lines) + bool(measure))
    for entry, (x, below) in zip(key, key_places(key, canvas.width), strict=True):
        y = first + LINE * below
        if entry.marker:
            canvas.mark(x + 6, y - 4, entry.marker, entry.colour, **entry.style)
        canvas.text(x + (16 if entry.marker else 0), y, entry.text, 12, entry.ink)
    return top + title_height(title, measure, key, canvas.width)


def title_height(title: str, measure: str, key: Sequence[Key], width: float) -> float:
    """Return the height in pixels of what `draw_title` draws."""
    lines = 1 + max((line for _, line in key_places(key, width)), default=-1)
    return LINE * (len(title.splitlines()) + bool(measure) + lines)


def key_places(key: Sequence[Key], width: float) -> list[tuple[float, int]]:
    """Return the left edge and the line of each entry of a legend; the widths of its texts are estimates."""
    places, x, line = [], 16.0, 0
    for entry in key:
        room = 6.6 * len(entry.text) + (34 if entry.marker else 18)
        if x + room > width and x > 16:
            x, line = 16.0, line + 1
        places.append((x, line))
        x += room
    return places


def beside(axes: Axes, text: str, x: float, y: float, shift: float, **more: Any) -> None:
    """Write a text `shift` pixels to the right of a point, to its left if negative, or centred on it if 0."""
    place: dict[str, Any] = {"xytext": (shift * PIXEL, 0), "textcoords": "offset points", "annotation_clip": False}
    side = "center" if shift == 0 else "left" if shift > 0 else "right"
    look: dict[str, Any] = {"ha": side, "va": "baseline", "fontsize": 11 * PIXEL, "color": COLOURS["quiet"]}
    axes.annotate(text, (x, y), **(place | look | more))
