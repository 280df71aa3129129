"""The script that sets predicted memory beside taken memory runs on a tiny base, which it makes."""

import pytest
from testbed.documents import ROOT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_base_is_made_predicted_and_trained(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import fit_memory

    # In this process, whose other tests take more than the fit: the numbers mean nothing here.
    monkeypatch.setattr(fit_memory, "in_own_process", fit_memory.measured)
    works = ["fit", "merge", "apply", "route"]
    fit_memory.main(["--work", str(tmp_path), "--shapes", "tiny", "--rows", "2", "--length", "16", "--works", *works])
    lines = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")
    ]
    assert [line[:4] for line in lines] == [["tiny", work, "bfloat16", "LoRA of rank 16"] for work in works]
    for predicted, taken, apart in (line[4:] for line in lines):
        expected, found = (float(number.replace(",", "")) for number in (predicted, taken))
        assert float(apart.removesuffix(" %")) == pytest.approx(100 * (expected / found - 1), abs=0.2)
    # The words of a process of its own.
    line = [str(tmp_path / "tiny"), "bfloat16", "1 % of the entries", "2", "16"]
    for work in ("fit", "merge"):
        fit_memory.main(["--line", "predicted", work, *line])
    assert int(capsys.readouterr().out.splitlines()[-1]) > 2**20
