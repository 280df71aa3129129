"""The terminal's table fits 80 columns and has every number; the sentences below it are few."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from testbed.quickstart_results import complete_results, in_another_order

from modular_experts.quickstart.report.summary import summary_sentences, summary_table


def shown(results, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(summary_table(results))
    return stream.getvalue()


def cells(text: str, name: str) -> list[str]:
    """Return what stands behind a name at the start of a line."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_80_columns_and_cuts_nothing(width) -> None:
    results = complete_results()
    for methods in results["merges"].values():
        for merges in methods.values():
            merges["20"] |= {"bytes": 123_456_789, "kept": 0.98765, "seconds": 1234.56}
    text = shown(results, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("123.5 MB") == text.count("1234.6") == 14
    assert text.count("98.8 %") == 14


def test_base_multitask_and_experts_have_their_rows() -> None:
    text = shown(complete_results())
    assert cells(text, "base ") == ["1.0", "1.3", "54.2"]
    assert cells(text, "base, own format") == ["80.1", "74.5"]
    assert cells(text, "multitask") == ["86.1", "55.2", "100", "%", "100", "%", "958", "kB", "15.2"]
    assert cells(text, "sparse entries, single") == ["76.7", "10", "%", "15", "%", "240", "kB", "1.3"]
    assert cells(text, "LoRA, single") == ["79.0", "5.4", "%", "5.45", "%", "59", "kB", "0.9"]


def test_each_merge_of_all_has_its_row_under_its_kind() -> None:
    results = complete_results()
    lines = [line.split() for line in shown(results).splitlines()]
    for methods in results["merges"].values():
        for method, merges in methods.items():
            merge = merges["20"]
            numbers = [f"{100 * merge['chosen'][role]['exact_match']:.1f}" for role in ("held_in", "held_out")]
            scale = f"\N{MULTIPLICATION SIGN}{merge['scale']:g}"
            found = [line for line in lines if scale in line and all(number in line for number in numbers)]
            assert len(found) == 1, (method, numbers)


@pytest.mark.parametrize("levels", [(2, 4), (2,), (2, 5, 10, 20)])
def test_a_run_tells_the_same_in_any_order(levels) -> None:
    results = complete_results(levels)
    assert shown(results) == shown(in_another_order(results))
    assert summary_sentences(results) == summary_sentences(in_another_order(results))


@pytest.mark.parametrize("kinds", [("sparse", "block", "lora", "full"), ("lora",), ("full", "block")])
def test_three_to_five_lines_of_sentences(kinds) -> None:
    lines = summary_sentences(complete_results(kinds=kinds))
    assert 3 <= len(lines) <= 5
    assert all(line.endswith(".") and "\n" not in line for line in lines)
    assert "one seed is one seed" in lines[-1]
