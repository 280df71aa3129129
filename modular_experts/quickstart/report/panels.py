"""Panels of the figure: all experts in one model, and the way there over a few.

Task arithmetic is left out: it is the average under another scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from modular_experts.quickstart.report.reading import KIND_NAMES, METHOD_NAMES, ROLE_NAMES, At, Reading, Role, percent
from modular_experts.quickstart.report.sheet import COLOURS, POINTS, WIDTH, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TogetherPanel", "WayPanel"]

# Method: its colour and its mark.
METHODS = {"Average": ("average", "s"), "SparseAverage": ("overlap", "o"), "TIES": ("ties", "^")}
REFERENCES = {"multitask": "multitask", "latent": "base, own format", "plain": "base"}
SHARES, SHARE_NAMES = [0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"]
DOTTED: dict[str, Any] = {"color": COLOURS["reference"], "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}


def shown(reading: Reading, kind: str) -> list[str]:
    """Return the methods that are drawn of those by which experts of a kind were merged."""
    return [method for method in METHODS if method in reading.methods(kind)]


def beside(axes: Axes, text: str, x: float, y: float, shift: float, **style: Any) -> None:
    """Write a text so many pixels to the right of a point, to the left if negative, or over it."""
    place: dict[str, Any] = {"xytext": (shift * POINTS, 0), "textcoords": "offset points", "annotation_clip": False}
    side = "center" if shift == 0 else "left" if shift > 0 else "right"
    look: dict[str, Any] = {"ha": side, "va": "baseline", "fontsize": 11 * POINTS, "color": COLOURS["quiet"]}
    axes.annotate(text, (x, y), **(place | look | style))


class TogetherPanel:
    """All experts merged: per kind and method a mark at scale 1 and one at the chosen scale, held in and held out.

    Args:
        reading: The results.
        top: Where on the sheet it starts, in pixels.
    """

    ROW, GAP, HEAD = 18, 12, 122
    SIDES: ClassVar[dict[Role, tuple[float, float]]] = {"held_in": (140, 374), "held_out": (584, 256)}

    def __init__(self, reading: Reading, top: float) -> None:
        self.reading, self.top = reading, top
        self.titles: dict[str, float] = {}
        self.rows: dict[tuple[str, str], float] = {}
        y = self.ROW / 2
        for kind in reading.kinds:
            self.titles[kind] = y
            for method in shown(reading, kind):
                y += self.ROW
                self.rows[kind, method] = y
            y += self.ROW + self.GAP
        self.body = y - self.GAP - 2
        self.height = self.HEAD + self.body + 22

    def draw(self, sheet: Sheet) -> None:
        """Draw the panel."""
        sheet.text(16, self.top, f"All {self.reading.everything} experts merged into one", 15, weight="bold")
        self._key(sheet, self.top + 24)
        for kind, y in self.titles.items():
            sheet.text(16, self._down(y) + 4, KIND_NAMES[kind], weight="bold")
        for (_, method), y in self.rows.items():
            sheet.text(16, self._down(y) + 4, METHOD_NAMES[method], 12, METHODS[method][0])
        for role, (left, width) in self.SIDES.items():
            sheet.text(left, self.top + 58, f"{len(self.reading.tasks(role))} {ROLE_NAMES[role]} tasks", weight="bold")
            axes = sheet.axes(left, self._down(0), width, self.body)
            self._side(axes, role)

    def _down(self, y: float) -> float:
        return self.top + self.HEAD + y

    def _key(self, sheet: Sheet, y: float) -> None:
        sheet.mark(22, y - 4, "o", markersize=5, markerfacecolor=COLOURS["paper"])
        sheet.text(32, y, "at scale 1", 12, "quiet")
        sheet.mark(120, y - 4, "o", markersize=6.5)
        sheet.text(130, y, "at the scale chosen on validation words", 12, "quiet")
        sheet.mark(396, y - 4, "|", "ink", markersize=9, markeredgewidth=2.25)
        sheet.text(404, y, "single experts, each on its own task", 12, "quiet")

    def _side(self, axes: Axes, role: Role) -> None:
        axes.set(xlim=(0, 1), ylim=(self.body, 0), yticks=[])
        axes.set_xticks(SHARES, SHARE_NAMES, fontsize=11 * POINTS)
        axes.grid(axis="x")
        self._references(axes, role)
        for (kind, method), y in self.rows.items():
            self._row(axes, role, kind, method, y)
        if role == "held_in":
            self._singles(axes)

    def _references(self, axes: Axes, role: Role) -> None:
        """Draw a line for each reference; the further right, the higher its name, so that no line crosses a name."""
        values = {name: self.reading.other(name, role) for name in REFERENCES}
        for step, name in enumerate(sorted(values, key=lambda name: values[name])):
            value, top = values[name], -8 - 14 * step
            axes.plot([value, value], [self.body, top - 6], **DOTTED, clip_on=False, gid=f"{role}-{name}")
            right = value > 0.5
            beside(axes, f"{REFERENCES[name]} {percent(value)}", value, top, -4 if right else 4)

    def _row(self, axes: Axes, role: Role, kind: str, method: str, y: float) -> None:
        colour, marker = COLOURS[METHODS[method][0]], METHODS[method][1]
        plain, chosen = (self.reading.merged(kind, method, role, at) for at in ("default", "chosen"))
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "clip_on": False, "zorder": 3}
        name = f"{role}-{kind}-{method}"
        axes.plot([plain, chosen], [y, y], color=colour, linewidth=1.25, zorder=2)
        axes.plot([plain], [y], **style, markersize=5, markerfacecolor=COLOURS["paper"], gid=f"{name}-default")
        axes.plot([chosen], [y], **style, markersize=6.5, gid=f"{name}-chosen")
        beside(axes, percent(chosen), 1, y + 4, 8, color=colour)

    def _singles(self, axes: Axes) -> None:
        for kind, title in self.titles.items():
            value, last = self.reading.single(kind), title + self.ROW * len(shown(self.reading, kind))
            place = [title + self.ROW / 2, last + self.ROW / 2]
            axes.plot([value] * 2, place, color=COLOURS["ink"], linewidth=2.25, zorder=4, gid=f"single-{kind}")
            box = {"boxstyle": "square,pad=0.15", "facecolor": COLOURS["paper"], "edgecolor": "none"}
            beside(axes, percent(value), value, title + 4, 0, color=COLOURS["ink"], bbox=box, zorder=5)


class WayPanel:
    """From single experts over merges of a few to that of all, held in: one chart for each kind.

    Args:
        reading: The results.
        top: Where on the sheet it starts, in pixels.
    """

    LEFT, SPACE, HEAD, TALL = 52, 24, 72, 180

    def __init__(self, reading: Reading, top: float) -> None:
        self.reading, self.top = reading, top
        self.height = self.HEAD + self.TALL + 50

    def draw(self, sheet: Sheet) -> None:
        """Draw the panel."""
        sheet.text(16, self.top, "From one expert to all, on held-in tasks", 15, weight="bold")
        self._key(sheet, self.top + 24)
        count = len(self.reading.kinds)
        width = (WIDTH - self.LEFT - 24 - self.SPACE * (count - 1)) / count
        for place, kind in enumerate(self.reading.kinds):
            left = self.LEFT + place * (width + self.SPACE)
            sheet.text(left, self.top + self.HEAD - 14, KIND_NAMES[kind], weight="bold")
            axes = sheet.axes(left, self.top + self.HEAD, width, self.TALL)
            self._chart(axes, kind)
            if place == 0:
                self._names(axes)
        sheet.text(self.LEFT, self.top + self.HEAD + self.TALL + 38, "experts in one merge", 11, "quiet")

    def _key(self, sheet: Sheet, y: float) -> None:
        for x, (method, (colour, marker)) in zip((22, 106, 222), METHODS.items(), strict=True):
            sheet.mark(x, y - 4, marker, colour, markersize=6)
            sheet.text(x + 10, y, METHOD_NAMES[method], 12, colour)
        sheet.text(284, y, "solid: at the chosen scale", 12, "quiet")
        sheet.text(458, y, "dotted: at scale 1", 12, "quiet")
        sheet.mark(588, y - 4, "o", "ink", markersize=6)
        sheet.text(598, y, "single experts", 12, "quiet")

    def _chart(self, axes: Axes, kind: str) -> None:
        counts = [1, *self.reading.levels]
        axes.set(xscale="log", xlim=(0.88, counts[-1] * 1.14), ylim=(0, 1))
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=11 * POINTS)
        axes.set_yticks(SHARES, [""] * len(SHARES))
        axes.minorticks_off()
        axes.grid(axis="y")
        for name in ("multitask", "plain"):
            axes.axhline(self.reading.other(name), **DOTTED, gid=f"way-{kind}-{name}")
        for method in shown(self.reading, kind):
            self._line(axes, kind, method, "default")
        for method in shown(self.reading, kind):
            self._line(axes, kind, method, "chosen")
        axes.plot([1], [self.reading.single(kind)], "o", color=COLOURS["ink"], markersize=6, zorder=5)

    def _names(self, axes: Axes) -> None:
        """Name the axis and the reference lines, once for all charts."""
        axes.set_yticks(SHARES, SHARE_NAMES, fontsize=11 * POINTS)
        for name in ("multitask", "plain"):
            value = self.reading.other(name)
            over = value + 0.017 if value < 0.9 else value - 0.068  # there is no room over a line near the top
            beside(axes, REFERENCES[name], axes.get_xlim()[1], over, -1)

    def _line(self, axes: Axes, kind: str, method: str, at: At) -> None:
        colour, marker = METHODS[method]
        levels = self.reading.levels
        heights = [self.reading.merged(kind, method, at=at, level=level) for level in levels]
        style: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (1, 1.4))}
        if at == "chosen":
            style = {"linewidth": 1.75, "marker": marker, "markersize": 5, "markevery": slice(1, None)}
        course = [self.reading.single(kind), *heights]
        axes.plot([1, *levels], course, color=COLOURS[colour], **style, zorder=3, gid=f"way-{kind}-{method}-{at}")
