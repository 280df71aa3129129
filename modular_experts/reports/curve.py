"""Draw shares over bytes as SVG: a panel for each kind, with bytes on a logarithmic axis."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from modular_experts.reports.figure import WIDTH, heading, line_of, styled, text_of
from modular_experts.reports.tables import number, percent

HEIGHT = 300.0  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 34.0, 30.0  # pixels around the axes of a panel
ABOVE = 26.0  # pixels over the highest mark, for its name
LETTER, LINE = 6.2, 14.0  # pixels of a letter and of a line of a label


@dataclass(frozen=True)
class Point:
    """A way with its bytes (1 is one copy) and the share that it keeps."""

    name: str
    size: float
    kept: float


def draw_curves(title: str, key: str, curves: Mapping[str, Sequence[Point]], wide: bool = True) -> str:
    """Draw the points of each kind, and a line along those that keep more than all smaller ones, which have names.

    Two panels stand beside each other if it is `wide`; `key` says what the axes mean.
    """
    found, top = heading(title, key, wide)
    width, across = WIDTH[wide], 2 if wide else 1
    points = [point for several in curves.values() for point in several]
    sizes, lowest = [math.log10(point.size) for point in points], min(point.kept for point in points)
    step = 0.1 if lowest >= 0.5 else 0.25
    low, high = step * math.floor(lowest / step), max(1.0, *(point.kept for point in points))
    area = (min(sizes) - 0.1, max(sizes) + 0.1), (low, high, step)
    for place, (kind, several) in enumerate(curves.items()):
        left, row = width / across * (place % across), place // across
        found += _panel(kind, several, (left, top + HEIGHT * row), width / across, area)
    return styled(title, found, width, top + HEIGHT * math.ceil(len(curves) / across))


def _panel(
    kind: str,
    points: Sequence[Point],
    corner: tuple[float, float],
    width: float,
    area: tuple[tuple[float, float], tuple[float, float, float]],
) -> list[str]:
    (first, last), (low, high, step) = area
    left, top, right, bottom = corner[0] + LEFT, corner[1] + TOP, corner[0] + width - RIGHT, corner[1] + HEIGHT - BOTTOM

    def x(size: float) -> float:
        return round(left + (right - left) * (math.log10(size) - first) / (last - first), 1)

    def y(kept: float) -> float:
        return round(bottom - (bottom - top - ABOVE) * (kept - low) / (high - low), 1)

    found = [text_of(left, top - 14, kind, "strong")]
    for share in (low + step * count for count in range(1 + int((1 - low) / step + 1e-9))):
        found += [line_of(left, y(share), right, y(share), "rule")]
        found += [text_of(left - 6, y(share) + 4, number(100 * share, 0), "quiet end")]
    for size in (one * 10.0**power for power in range(-5, 5) for one in (1, 2, 5)):
        if first <= math.log10(size) <= last and (last - first < 2.2 or f"{size:e}"[0] == "1"):
            found += [line_of(x(size), top, x(size), bottom, "rule")]
            found += [text_of(x(size), bottom + 18, f"{100 * size:g} %", "quiet middle")]
    smaller = {one: [two for two in points if two != one and two.size <= one.size] for one in points}
    ahead = [one for one in points if all(one.kept > two.kept for two in smaller[one])]
    for one, two in itertools.pairwise(ahead):
        found += [line_of(x(one.size), y(one.kept), x(two.size), y(two.kept), "step")]
    # Filled marks lie over the hollow ones.
    for point in sorted(points, key=ahead.__contains__):
        look = "" if point in ahead else ' class="before"'
        about = escape(f"{point.name}: {percent(point.size)} % of a copy, {percent(point.kept)} % kept")
        place = f'cx="{x(point.size)}" cy="{y(point.kept)}" r="4"'
        found.append(f"<circle {place}{look}><title>{about}</title></circle>")
    taken = [(x(point.size) - 5, y(point.kept) - 5, x(point.size) + 5, y(point.kept) + 5) for point in points]
    for point in ahead:
        found += _label(point.name, x(point.size), y(point.kept), (left, right), taken)
    return found


def _label(
    name: str, x: float, y: float, edges: tuple[float, float], taken: list[tuple[float, float, float, float]]
) -> list[str]:
    """Return a name beside a mark where it covers nothing that is there, or nothing where there is no such place."""
    long = LETTER * len(name)
    for down in (4, 18, -10, 32, -24, 46, 60, 74):
        for end in (False, True):
            edge = x - 8 if end else x + 8
            start = edge - long * end
            box = start, y + down - LINE + 3, start + long, y + down + 3
            free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if free and edges[0] <= start and start + long <= edges[1]:
                taken.append(box)
                pointer = [line_of(x, y, edge, y + down - 4, "reference")] * (down != 4)
                return [*pointer, text_of(edge, y + down, name, "end" * end)]
    return []
