"""`methods`: every merge method with its formula, settings and source."""

import inspect
from dataclasses import fields

from modular_experts import methods
from modular_experts.__main__ import main
from modular_experts.methods.method import documentation

NAMES = [name for name in methods.__all__ if name != "MergeMethod"]


def test_list_names_ten_methods_by_what_they_need_and_every_method_if_asked(capsys):
    assert main(["methods", "--all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} " in shown for name in NAMES)
    assert main(["methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    first = [name for names in methods.FIRST.values() for name in names]
    assert len(set(first)) == 10
    assert [name for name in NAMES if f" {name} " in shown and name in first] == sorted(first)
    assert " DARE " not in shown
    assert "modular-experts methods --all" in shown


def test_each_method_shows_its_settings_defaults_and_source(capsys):
    for name in NAMES:
        assert main(["methods", name]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        kind = getattr(methods, name)
        about, texts = documentation(kind)
        first = about.split("\n\n")[0]
        assert ":" in first, f"{name} has no formula line"
        assert " ".join(first.split()) in shown
        settings = [field.name for field in fields(kind) if not field.name.startswith("_")]
        assert "scale" in settings or name == "Distilled"
        for setting in settings:
            assert texts[setting], f"{name}.{setting} has no text"
            assert f"{setting}: {texts[setting]}" in shown
        source = inspect.getdoc(inspect.getmodule(kind)).split("\n\n")[0]
        assert " ".join(source.split()) in shown


def test_model_stock_says_over_which_experts_it_averages(capsys):
    assert main(["methods", "ModelStock"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "where the mean is over the N experts that move the weight" in shown


def test_unknown_method_gets_a_near_name(capsys):
    for name in ("TEIS", "ties"):
        assert main(["methods", name]) == 2
        assert f"there is no class '{name}'; did you mean TIES?" in capsys.readouterr().err
