"""The report is one well-formed file with all numbers of the run, its commands run, and its table fits a terminal."""

from __future__ import annotations

import html
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from testbed.quickstart_results import complete_results, in_another_order

from modular_experts.__main__ import main
from modular_experts.library import Library
from modular_experts.quickstart import draw_figure, summary_sentences, summary_table, write_report
from modular_experts.quickstart.report import next_commands
from modular_experts.quickstart.rows import as_results

TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture(scope="module")
def figure(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("figure") / "figure.svg"
    draw_figure(complete_results(), file)
    return file


def written(results: dict[str, Any], figure: Path, folder: Path) -> str:
    write_report(results, figure, folder / "report.html", "runs/quickstart")
    return (folder / "report.html").read_text(encoding="utf-8")


def parsed(page: str) -> ElementTree.Element:
    """Return the page's tree; any tag that is not closed, and any stray & or <, is an error here."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())  # non-breaking spaces too


def tables(page: str) -> list[list[list[str]]]:
    return [[[text_of(cell) for cell in row] for row in table.iter("tr")] for table in parsed(page).iter("table")]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def test_the_page_needs_nothing_but_itself(figure, tmp_path) -> None:
    page = written(complete_results(), figure, tmp_path)
    tree = parsed(page)
    names = {item.tag.rpartition("}")[2] for item in tree.iter()}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for item in tree.iter():
        for name, value in item.attrib.items():
            if name.rpartition("}")[2] in ("src", "href", "action", "data", "srcset"):
                assert value.startswith("#")
            assert not name.startswith("on")
    assert "url(http" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\"<> ]*", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "arXiv 2507.07140" in text_of(tree)


def test_single_experts_and_their_costs_are_in_a_table(figure, tmp_path) -> None:
    results = complete_results()
    rows = tables(written(results, figure, tmp_path))[0]
    found = {row[0]: row[1:] for row in rows}
    for kind, name in {"sparse": "sparse entries", "block": "sparse tiles", "lora": "LoRA", "full": "full"}.items():
        experts = list(results["experts"][kind].values())
        mean = {key: fmean(expert[key] for expert in experts) for key in experts[0]}
        quality = [percent(mean["exact_match"]), percent(mean["rougeL"]), f"{mean['loss']:.3f}"]
        shares = [f"{100 * mean[key]:.3g} %" for key in ("kept", "ever_trained")]
        cost = [f"{round(mean['parameters']):,}", f"{mean['bytes'] / 1000:.3g} kB", f"{mean['seconds']:.1f}"]
        assert found[name] == [*quality, *shares, *cost]


@pytest.mark.parametrize("levels", [(2, 5, 10, 20), (2, 4)])
def test_every_level_is_in_a_table(figure, tmp_path, levels) -> None:
    results = complete_results(levels)
    rows = tables(written(results, figure, tmp_path))[1]
    assert rows[0] == ["", "single", *[f"{level} in one" for level in levels]]
    expected = []
    for kind, methods in results["merges"].items():
        experts = results["experts"][kind].values()
        expected.append(percent(sum(expert["exact_match"] for expert in experts) / len(experts)))
        for method, merges in methods.items():
            values = [percent(merges[str(level)]["chosen"]["held_in"]["exact_match"]) for level in levels]
            expected.append([method, "", *values])
    assert [row[1] if row[2] == "" else row for row in rows[1:]] == expected


def test_merges_of_all_are_in_a_table_with_scale_and_cost(figure, tmp_path) -> None:
    results = complete_results()
    rows = tables(written(results, figure, tmp_path))[2]
    expected = []
    for methods in results["merges"].values():
        for method, merges in methods.items():
            merge = merges["20"]
            plain = [percent(merge["default"][role]["exact_match"]) for role in ("held_in", "held_out")]
            chosen = [percent(merge["chosen"][role]["exact_match"]) for role in ("held_in", "held_out")]
            inside = merge["chosen"]["held_in"]
            size = merge["bytes"]
            cost = [f"{100 * merge['kept']:.3g} %", f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"]
            quality = [percent(inside["rougeL"]), f"{inside['loss']:.3f}"]
            scale = f"{TIMES}{merge['scale']:g}"
            expected.append([method, *plain, scale, *chosen, *quality, *cost, f"{merge['seconds']:.2f}"])
    assert [row for row in rows[2:] if row[1]] == expected


def test_held_in_stands_beside_held_out(figure, tmp_path) -> None:
    found = {row[0]: row[1:] for row in tables(written(complete_results(), figure, tmp_path))[3]}
    assert found == {
        "": ["held-in", "held-out"],
        "base, as it is": ["1.0", "1.3"],
        "base, own format": ["80.1", "74.5"],
        "sparse entries, SparseAverage": ["55.6", "48.4"],
        "sparse tiles, SparseAverage": ["53.8", "46.1"],
        "LoRA, Average": ["55.2", "47.1"],
        "full, Average": ["56.8", "46.6"],
        "multitask": ["86.1", "55.2"],
    }


def test_date_machine_versions_and_library_are_named(figure, tmp_path) -> None:
    tree = parsed(written(complete_results() | {"date": "2026-11-26"}, figure, tmp_path))
    found = {text_of(item.find("dt")): text_of(item.find("dd")) for item in tree.findall("body/main/footer/dl/div")}
    assert found.pop("versions").startswith("modular-experts 0.1.0, torch 2.13.0")
    expected = {"library": "runs/quickstart/library", "seed": "7", "machine": "2 cores, x86_64", "date": "2026-11-26"}
    assert found == expected


def test_every_section_has_one_takeaway_and_a_link_in_the_contents(figure, tmp_path) -> None:
    tree = parsed(written(complete_results(), figure, tmp_path))
    sections = list(tree.iter("section"))
    for section in sections:
        (takeaway,) = section.findall("h2")
        assert 20 < len(text_of(takeaway)) < 140
    links = [link.get("href") for link in tree.findall("body/main/nav/a")]
    assert links == [f"#{section.get('id')}" for section in sections]
    assert len(sections) == 8


def test_the_headline_compares_experts_of_one_kind_with_their_own_merge(figure, tmp_path) -> None:
    tree = parsed(written(complete_results(), figure, tmp_path))
    (figures,) = [item for item in tree.iter("dl") if item.get("class") == "figures"]
    shown = {text_of(item.find("dt")): item.find("dd").text for item in figures}
    values = ["1.0 %", "76.7 %", "55.6 %", "86.1 %"]
    names = ["the base", "sparse entries, alone", "sparse entries, merged", "multitask"]
    assert shown == dict(zip(names, values, strict=True))


def test_an_example_comes_first_if_the_run_kept_answers(figure, tmp_path) -> None:
    results = complete_results()
    assert "example" not in [item.get("class") for item in parsed(written(results, figure, tmp_path)).iter("dl")]
    asked = {"input": "order <reverse> c a b =", "target": "b a c"}
    said = {"base": "c a b , b a c", "single": "b a c", "merged": "b a c"}
    answers = {name: [asked | {"answer": "a"}, asked | {"answer": text}] for name, text in said.items()}
    merge = results["merges"]["sparse"]["SparseAverage"]["20"]
    results["base"]["answers"] = dict.fromkeys(results["tasks"], answers["base"])
    merge["answers"] = dict.fromkeys(results["tasks"], answers["merged"])
    for expert in results["experts"]["sparse"].values():
        expert["answers"] = answers["single"]
    merge["exact_match"] = dict.fromkeys([*results["tasks"], *results["held_out"]], 0.25) | {"upper": 0.0}
    tree = parsed(written(results, figure, tmp_path))
    (shown,) = [item for item in tree.iter("dl") if item.get("class") == "example"]
    lines = [" ".join(map(text_of, item)) for item in shown]
    assert lines == [
        "input order <reverse> c a b =",
        "wanted b a c",
        "the base c a b , b a c wrong",
        "expert for reverse b a c right",
        "all 20 merged b a c right",
    ]
    by_task = {row[0]: row for row in tables(written(results, figure, tmp_path))[4]}
    assert by_task[""][-1] == "merged"
    assert by_task["upper"][-1] == "0.0"
    assert by_task["sort_down"][-1] == "25.0"


def test_the_page_does_not_depend_on_the_order_of_the_results(figure, tmp_path) -> None:
    results = complete_results()
    (tmp_path / "turned").mkdir()
    turned = in_another_order(results) | {name: results[name] for name in ("plan", "base", "versions")}
    assert written(results, figure, tmp_path) == written(turned, figure, tmp_path / "turned")


def test_text_never_becomes_markup(figure, tmp_path) -> None:
    results = complete_results()
    evil = '<script>alert("&")</script>'
    results["versions"][evil] = results["machine"] = evil
    for experts in results["experts"].values():
        experts[evil] = experts.pop("reverse")
    results["tasks"][0] = evil
    write_report(results, figure, tmp_path / "report.html", f"runs/{evil}")
    page = (tmp_path / "report.html").read_text()
    assert not list(parsed(page).iter("script"))
    assert page.count(html.escape(evil)) >= 3


def test_the_figure_is_inside_and_takes_the_colours_of_the_page(figure, tmp_path) -> None:
    page = written(complete_results(), figure, tmp_path)
    wide, narrow = parsed(page).iter("{http://www.w3.org/2000/svg}svg")
    ids = [item.get("id") for item in parsed(page).iter() if item.get("id")]
    assert len(ids) == len(set(ids))
    links = [value.removeprefix("#") for item in narrow.iter() for name, value in item.items() if "href" in name]
    links += narrow.get("aria-labelledby").split()
    assert links
    assert all(link.startswith("narrow-") and link in ids for link in links)
    for svg in (wide, narrow):
        assert "width" not in svg.attrib
        assert svg.get("viewBox")
        assert "SparseAverage" in text_of(svg)
    assert text_of(parsed(page)).count("overlap-aware") == 1
    style = page[page.index("<style>") : page.index("</style>")]
    used = set(re.findall(r"var\((--\w+)", page))
    assert {"--paper", "--ink", "--overlap", "--ties", "--average"} <= used
    for name in used - {"--share", "--key", "--heat"}:
        assert style.count(f"{name}:") == 2, f"{name} is not given in light and dark"


def test_the_commands_carry_the_directory_of_the_run() -> None:
    commands = next_commands(as_results(complete_results()), "runs/it's mine")
    assert len(commands) == 3
    for command in commands.values():
        words = shlex.split(command.replace("\\\n", " "))
        assert words[0] == "modular-experts"
        assert any("runs/it's mine" in word for word in words)


def test_the_three_commands_run_as_printed(tmp_path, monkeypatch, tiny_llama_dir, task_files, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    shutil.copytree(tiny_llama_dir, "runs/quickstart/base")
    shutil.copy(task_files["upper"], "mine.jsonl")
    train, merge, test = next_commands(as_results(complete_results()), "runs/quickstart").values()
    first = train.replace("mine", "sparse-reverse").replace("sparse-reverse.jsonl", "mine.jsonl")  # one of the run's
    for command in (first, train, merge, test):
        words = shlex.split(command.replace("\\\n", " ").replace("max_steps 100", "max_steps 2"))
        assert main(words[1:]) == 0, command
    assert set(Library("runs/quickstart/library")) == {"mine", "sparse-reverse", "mine-and-reverse"}
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(("levels", "kinds"), [((2,), ("lora",)), ((2, 4), ("full", "block"))])
def test_a_short_run_with_fewer_kinds_has_a_page_too(tmp_path, levels, kinds) -> None:
    results = complete_results(levels, kinds)
    draw_figure(results, tmp_path / "figure.svg")
    page = written(results, tmp_path / "figure.svg", tmp_path)
    assert f"{levels[-1]} experts, one model" in page
    assert len(tables(page)) == 5


def test_a_loss_that_is_no_number_is_a_dash(figure, tmp_path) -> None:
    results = complete_results()
    results["merges"]["full"]["TaskArithmetic"]["20"]["chosen"]["held_in"]["loss"] = None
    results["experts"]["lora"]["upper"]["loss"] = None
    found = tables(written(results, figure, tmp_path))
    assert found[0][3][3] == "-"
    assert [row[7] for row in found[2] if row[0] == "TaskArithmetic"][-1] == "-"


def terminal(results: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(summary_table(results))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_table_fits_80_columns_and_cuts_nothing(width) -> None:
    results = complete_results()
    for methods in results["merges"].values():
        for merges in methods.values():
            merges["20"] |= {"bytes": 123_456_789, "kept": 0.98765, "seconds": 1234.56}
    text = terminal(results, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("123 MB") == text.count("1234.6") == text.count("98.8 %") == 14


def test_the_terminal_table_has_base_multitask_experts_and_merges() -> None:
    results = complete_results()
    lines = [" ".join(line.split()) for line in terminal(results).splitlines()]
    assert {
        "base 1.0 1.3 54.2",
        "base, own format 80.1 74.5",
        "multitask 86.1 55.2 100 % 100 % 958 kB 15.2",
        "sparse entries, single 76.7 10 % 15 % 240 kB 1.3",
        "LoRA, single 79.0 5.4 % 5.45 % 58.8 kB 0.9",
    } <= set(lines)
    for methods in results["merges"].values():
        for method, merges in methods.items():
            merge = merges["20"]
            numbers = " ".join(percent(merge["chosen"][role]["exact_match"]) for role in ("held_in", "held_out"))
            assert sum(line.startswith(f"{method} {TIMES}{merge['scale']:g} {numbers} ") for line in lines) == 1


def test_five_findings_are_the_same_in_any_order_of_the_results() -> None:
    results = complete_results()
    lines = summary_sentences(results)
    assert len(lines) == 5
    assert all(line.endswith(".") and "\n" not in line for line in lines)
    assert summary_sentences(in_another_order(results)) == lines
    assert terminal(in_another_order(results)) == terminal(results)
