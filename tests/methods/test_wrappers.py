"""A method inside another: its settings have dotted names, and its needs and record count."""

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.__main__ import main
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.methods import DARE, SVC, TIES, Fisher, KnOTS, SparseAverage
from modular_experts.methods.method import Needs
from modular_experts.methods.wrapper import settings_of, with_settings


@pytest.fixture
def library(tmp_path):
    record = make_record("X", {"id": "none", "fingerprint": "0" * 64})
    for seed, name in enumerate(("a", "b")):
        write_expert(tmp_path / name, [("m.weight", random_delta("Dense", (6, 8), seed, torch.float32))], record)
    return tmp_path


def command(library, *options):
    return main(["merge", "--experts", str(library / "a"), str(library / "b"), "--out", str(library / "ab"), *options])


def test_settings_of_the_inner_method_have_dotted_names():
    method = SVC(KnOTS(TIES(keep=0.3)), alpha=0.25)
    found = settings_of(method)
    assert {name: found[name] for name in ("alpha", "inner.scale", "inner.inner.keep")} == {
        "alpha": 0.25,
        "inner.scale": 1.0,
        "inner.inner.keep": 0.3,
    }
    changed = with_settings(method, {"scale": 2.0, "inner.inner.keep": 0.1, "inner.scale": 3.0})
    assert changed == SVC(KnOTS(TIES(keep=0.1), scale=3.0), scale=2.0, alpha=0.25)
    assert with_settings(method, {"inner": SparseAverage(), "inner.exponent": 0.5}).inner == SparseAverage(exponent=0.5)
    with pytest.raises(ValueError, match="keep"):
        with_settings(method, {"inner.inner.keep": 2.0})


def test_needs_are_those_of_both():
    inner, found = Fisher().needs, SVC(Fisher()).needs
    assert found.statistics == "fisher"
    assert found.matrices == SVC.own.matrices + inner.matrices
    assert SVC(DARE(rescale="l1")).needs.copies == DARE(rescale="l1").needs.copies > 0
    one = Needs(matrices=1, matrices_per_expert=2, squares=3, copies=4)
    assert one + one == Needs(matrices=2, matrices_per_expert=4, squares=6, copies=8)


def test_the_command_line_names_the_inner_method_and_its_settings(library, capsys):
    assert command(library, "--method", "SVC", "--method.inner", "TIES", "--method.inner.keep", "0.3") == 0
    assert "with SVC(inner=TIES(" in capsys.readouterr().out
    merged = open_expert(library / "ab")
    experts = [open_expert(library / name) for name in ("a", "b")]
    expected = SVC(TIES(keep=0.3)).merge([expert["m.weight"] for expert in experts])
    assert torch.equal(merged["m.weight"].dense(), expected.dense())
    inner = merged.record["method"]["init_args"]["inner"]
    assert inner["class_path"].endswith(".TIES")
    assert inner["init_args"]["keep"] == 0.3
    assert main(["show", str(library / "ab")]) == 0
    assert "keep=0.3" in capsys.readouterr().out
