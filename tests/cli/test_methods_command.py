"""`methods`: every merge method with its formula, settings and source."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from modular_experts import methods
from modular_experts.__main__ import main

NAMES = [name for name in methods.__all__ if name != "MergeMethod"]


def test_list_names_every_method_with_its_formula(capsys):
    assert main(["methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        assert name in shown


@pytest.mark.parametrize("name", NAMES)
def test_one_method_tells_its_settings_defaults_and_source(name, capsys):
    assert main(["methods", name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    kind = getattr(methods, name)
    first = " ".join(inspect.getdoc(kind).split("\n\n")[0].split())
    assert first in shown
    for field in fields(kind):
        if not field.name.startswith("_"):
            assert f"{field.name}:" in shown
    source = " ".join(inspect.getdoc(inspect.getmodule(kind)).split("\n\n")[0].split())
    assert source in shown


def test_unknown_method_gets_a_near_name(capsys):
    assert main(["methods", "TEIS"]) == 1
    assert "there is no merge method 'TEIS'; did you mean TIES?" in capsys.readouterr().err
    assert main(["methods", "ties"]) == 1
    assert "did you mean TIES?" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_formula_line_and_a_scale(name):
    kind = getattr(methods, name)
    first = inspect.getdoc(kind).split("\n\n")[0]
    assert ":" in first
    assert "scale" in {field.name for field in fields(kind)}
    documented = inspect.getdoc(kind).partition("Args:")[2]
    for field in fields(kind):
        if not field.name.startswith("_"):
            assert f"    {field.name}: " in documented, f"{name}.{field.name} has no line under Args"


@pytest.mark.parametrize("name", NAMES)
def test_settings_keep_their_types_on_the_command_line(name, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--method.help", name])
    assert "Unvalidated" not in capsys.readouterr().out
