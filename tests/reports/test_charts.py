"""The figure of a run holds a mark for each number, at the place of that number, and needs no other file."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from testbed.quickstart_results import complete_results, in_another_order

from modular_experts.quickstart import draw_figure as draw
from modular_experts.quickstart.figure import figure
from modular_experts.reports.svg import COLOURS, DARK

ROLES = ("held_in", "held_out")
DRAWN = {"sparse": 3, "block": 3, "lora": 2, "full": 2}  # methods: without task arithmetic


def drawn(results: dict[str, Any], folder: Path) -> ElementTree.Element:
    draw(results, folder / "figure.svg")
    return ElementTree.fromstring((folder / "figure.svg").read_text())


def group(svg: ElementTree.Element, name: str) -> ElementTree.Element:
    found = [element for element in svg.iter() if element.get("id") == name]
    assert len(found) == 1, f"{len(found)} marks named {name}"
    return found[0]


def course(svg: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """Return the points of a line, or of the marks that have no line."""
    element = group(svg, name)
    uses = [use for use in element.iter() if use.tag.endswith("}use")]
    paths = [path for path in element if path.tag.endswith("}path")]
    if paths:
        numbers = re.findall(r"[ML] (\S+) (\S+)", paths[0].get("d"))
        return [(float(x), float(y)) for x, y in numbers]
    return [(float(use.get("x")), float(use.get("y"))) for use in uses]


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text for element in svg.iter() if element.tag.endswith("}text")]


def test_the_figure_is_one_file_without_date_or_reference(tmp_path) -> None:
    svg = drawn(complete_results(), tmp_path)
    text = (tmp_path / "figure.svg").read_text()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert set(re.findall(r'https?://[^"<> ]*', text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "date" not in text.lower().replace("validated", "")
    links = [value for element in svg.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert links
    assert all(link.startswith("#") for link in links)


def test_the_same_results_give_the_same_bytes_in_any_order_and_under_any_matplotlibrc(tmp_path) -> None:
    import matplotlib

    draw(complete_results(), tmp_path / "one.svg")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "lines.linewidth": 9}):
        draw(in_another_order(complete_results()), tmp_path / "two.svg")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(("role", "levels"), [("held_in", (2, 5, 10, 20)), ("held_out", (2,))])
def test_marks_of_the_merges_lie_where_their_numbers_say(tmp_path, levels, role) -> None:
    results = complete_results(levels)
    svg = drawn(results, tmp_path)
    base, multitask = (course(svg, f"{role}-{name}")[0][0] for name in ("plain", "multitask"))
    low, high = results["base"]["plain"][role]["exact_match"], results["multitask"][role]["exact_match"]
    for kind, methods in results["merges"].items():
        for method in methods.keys() - {"TaskArithmetic"}:
            for at in ("default", "chosen"):
                (place,) = course(svg, f"{role}-{kind}-{method}-{at}")
                value = methods[method][str(levels[-1])][at][role]["exact_match"]
                expected = base + (value - low) / (high - low) * (multitask - base)
                assert place[0] == pytest.approx(expected, abs=0.01), (kind, method, at)


def test_single_experts_stand_beside_their_merges(tmp_path) -> None:
    results = complete_results()
    svg = drawn(results, tmp_path)
    base, multitask = (course(svg, f"held_in-{name}")[0][0] for name in ("plain", "multitask"))
    for kind, experts in results["experts"].items():
        mean = sum(expert["exact_match"] for expert in experts.values()) / len(experts)
        expected = base + (mean - 0.0104) / (0.861 - 0.0104) * (multitask - base)
        (left, top), (right, bottom) = course(svg, f"single-{kind}")
        assert left == right == pytest.approx(expected, abs=0.01)
        rows = [course(svg, f"held_in-{kind}-{method}-chosen")[0][1] for method in ("Average", "TIES")]
        assert top < min(rows) < max(rows) < bottom


@pytest.mark.parametrize(("at", "levels"), [("default", (2, 5, 10, 20)), ("chosen", (2, 4)), ("chosen", (2,))])
def test_lines_go_from_the_single_experts_over_all_levels(tmp_path, levels, at) -> None:
    results = complete_results(levels)
    svg = drawn(results, tmp_path)
    for kind, experts in results["experts"].items():
        single = sum(expert["exact_match"] for expert in experts.values()) / len(experts)
        for method in results["merges"][kind].keys() - {"TaskArithmetic"}:
            merges = results["merges"][kind][method]
            values = [single, *[merges[str(level)][at]["held_in"]["exact_match"] for level in levels]]
            points = course(svg, f"way-{kind}-{method}-{at}")
            assert len(points) == 1 + len(levels)
            (x0, y0), (x1, y1) = points[0], points[-1]
            base, multitask = (course(svg, f"way-{kind}-{name}")[0][1] for name in ("plain", "multitask"))
            for level, value, (x, y) in zip((1, *levels), values, points, strict=True):
                assert (x - x0) / (x1 - x0) == pytest.approx(math.log(level) / math.log(levels[-1]), abs=1e-4)
                assert y == pytest.approx(base + (value - 0.0104) / (0.861 - 0.0104) * (multitask - base), abs=0.01)
            assert (y1 > y0) == (values[-1] < single)  # downwards on the page


def test_numbers_are_written_beside_the_marks(tmp_path) -> None:
    results = complete_results()
    written = texts(drawn(results, tmp_path))
    for kind, methods in results["merges"].items():
        for method in methods.keys() - {"TaskArithmetic"}:
            for role in ROLES:
                assert f"{100 * methods[method]['20']['chosen'][role]['exact_match']:.1f}" in written, (kind, method)
    assert {"76.7", "69.3", "79.0", "85.7", "multitask 86.1", "multitask 55.2", "base 1.0"} <= set(written)
    assert written.count("SparseAverage") == 4  # of both sparse kinds, and in both keys
    assert written.count("TIES") == 6


def test_the_figure_states_its_finding_and_its_measure(tmp_path) -> None:
    written = texts(drawn(complete_results(), tmp_path))
    # The headline is broken into lines, none of which is wider than the figure.
    finding = ["20 sparse-entry experts in one model, untuned: SparseAverage is best with 54.9 % (TIES", "46.9 %)"]
    assert [line for line in written if line in finding] == finding
    assert written.count("Exact match, in % of test words") == 2


def test_the_dark_figure_differs_in_its_colours_alone(tmp_path) -> None:
    draw(complete_results(), tmp_path / "light.svg")
    draw(complete_results(), tmp_path / "dark.svg", dark=True)
    light, dark = ((tmp_path / f"{name}.svg").read_text() for name in ("light", "dark"))
    for role, colour in COLOURS.items():
        assert colour not in dark
        light = light.replace(colour, DARK[role])
    assert light == dark


def test_the_narrow_figure_has_the_same_marks_below_each_other() -> None:
    wide, narrow = (ElementTree.fromstring(figure(complete_results(), narrow=narrow)) for narrow in (False, True))
    marks = [
        {name for name in (item.get("id") or "" for item in svg.iter()) if re.match("held_|way-|single-", name)}
        for svg in (wide, narrow)
    ]
    assert marks[0] == marks[1]
    assert float(narrow.get("viewBox").split()[2]) == 0.75 * 390
    first, second = (course(narrow, f"{role}-sparse-TIES-chosen")[0] for role in ROLES)
    assert first[1] < second[1]


def test_a_method_that_was_not_used_has_no_mark(tmp_path) -> None:
    svg = drawn(complete_results(kinds=("lora", "sparse")), tmp_path)
    names = {element.get("id") or "" for element in svg.iter()}
    assert sum(name.startswith("held_in-") for name in names) == 2 + 2 * (DRAWN["sparse"] + DRAWN["lora"])
    assert not [name for name in names if "full" in name or "lora-SparseAverage" in name]


def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("modular_experts.reports.svg.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'modular-experts[report]'")):
        draw(complete_results(), tmp_path / "figure.svg")
    assert not (tmp_path / "figure.svg").exists()
