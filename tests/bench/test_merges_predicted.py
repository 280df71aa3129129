"""benchmarks/merges_predicted.py ranks as statistics books do, and asks for results that are not there."""

from __future__ import annotations

import pytest
import torch
from testbed.scripts import run_script


def test_rank_correlation_is_spearmans(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    correlation = import_module("merges_predicted").rank_correlation
    one, other = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([5.0, 6, 7, 8, 7])
    assert correlation(one, other) == pytest.approx(0.820782681668123)  # ties take their mean rank
    assert correlation(one, one.exp()) == pytest.approx(1)
    assert correlation(one, -one) == pytest.approx(-1)
    assert correlation(one, torch.ones(5)) == 0


def test_missing_results_get_a_sentence(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"no merge by SparseAverage of sparse, seed 0; first run merge_quality\.py"):
        run_script("merges_predicted.py", "--work", str(tmp_path))
