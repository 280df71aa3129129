"""The script that sets predicted memory beside taken memory runs on a tiny base, which it makes."""

import pytest
from testbed.documents import ROOT


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_base_is_made_predicted_and_trained(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import fit_memory

    # In this process, which takes more than the fit.
    monkeypatch.setattr(fit_memory, "in_own_process", fit_memory.measured)
    fit_memory.main(["--work", str(tmp_path), "--shapes", "tiny", "--rows", "2", "--length", "16"])
    base, form, kind, predicted, taken, apart = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (base, form, kind) == ("tiny", "bfloat16", "LoRA of rank 16")
    assert float(predicted.replace(",", "")) == pytest.approx(float(taken.replace(",", "")), rel=0.1)
    assert abs(float(apart.removesuffix(" %"))) < 10
    # The words of a process of its own.
    fit_memory.main(["--line", "predicted", str(tmp_path / "tiny"), "bfloat16", "1 % of the entries", "2", "16"])
    assert int(capsys.readouterr().out.splitlines()[-1]) > 2**20
