"""One definition of the things that a stored result depends on: settings, and the user's code that they name."""

import importlib
import sys
from pathlib import Path

import pytest

from modular_experts.library.result_key import named_contents, own_code, result_key

MINE = """
from math import sqrt
from torch import nn
from mine_helper import factor

class Mine:
    scale = factor()

def score(weight, gradient, delta):
    return gradient
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, and another one that it imports."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine_helper.py").write_text("def factor():\n    return 1\n")
    (tmp_path / "mine.py").write_text(MINE)
    yield importlib.import_module("mine")
    for name in ("mine", "mine_helper"):
        sys.modules.pop(name, None)


def ways(mine) -> list:
    """Return the settings in which a class or a function of the user's may stand."""
    nested = {"callbacks": [{"class_path": "MaskSchedule", "init_args": {"score": "mine.score"}}]}
    return ["mine.Mine", {"class_path": "mine.Mine"}, nested, ["TIES", ("mine.Mine",)], mine.Mine, mine.score]


def test_a_key_changes_with_each_of_its_parts() -> None:
    keys = [result_key("a", {"b": 1}), result_key("a", {"b": 2}), result_key("c", {"b": 1}), result_key("a")]
    assert len(set(keys)) == 4
    assert result_key("a", {"b": 1}) == keys[0]


@pytest.mark.parametrize(
    "importing",
    [
        "from helpers.numbers import FACTOR",
        "import helpers.numbers",
        "def length(generated, target):\n    from helpers.numbers import FACTOR",
        "from helpers import numbers",
        "from inside import numbers",
    ],
)
def test_a_key_changes_with_what_the_users_code_imports_in_any_way(tmp_path, monkeypatch, importing) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("helpers", "inside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numbers.py").write_text("FACTOR = 1\n")
    (tmp_path / "inside" / "__init__.py").write_text("from . import numbers\n")
    (tmp_path / "metric.py").write_text(f"{importing}\n\nclass Metric:\n    pass\n")
    importlib.import_module("metric")
    before = result_key("metric.Metric")
    for name in ("helpers", "inside"):
        (tmp_path / name / "numbers.py").write_text("FACTOR = 2\n")
    assert result_key("metric.Metric") != before
    (tmp_path / "metric.py").write_text("A line that is no code")
    assert [*own_code("metric.Metric")] == ["metric"]
    for name in [one for one in sys.modules if one.partition(".")[0] in ("metric", "helpers", "inside")]:
        del sys.modules[name]


@pytest.mark.parametrize("changed", ["mine.py", "mine_helper.py"])
def test_a_key_changes_with_the_users_code_that_settings_name(mine, changed) -> None:
    before = [result_key(one) for one in ways(mine)]
    assert [result_key(one) for one in ways(mine)] == before
    others = result_key("TIES", "mine.jsonl/x", "modular_experts.methods.TIES", None, 0.5)
    file = Path(mine.__file__).with_name(changed)
    file.write_text(file.read_text() + "\n\nLATER = 1\n")
    assert not {*before} & {result_key(one) for one in ways(mine)}
    assert result_key("TIES", "mine.jsonl/x", "modular_experts.methods.TIES", None, 0.5) == others


def test_the_versions_stand_for_the_code_of_installed_packages(mine) -> None:
    assert [*own_code("mine.Mine")] == ["mine", "mine_helper"]
    assert not own_code(["modular_experts.methods.TIES", "math.sqrt", "not_loaded.Thing", "plain words. And more"])
    assert [*own_code("torch.optim.AdamW")] == ["torch.optim"]


def test_files_and_models_count_and_folders_without_either_do_not(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("1")
    for folder in ("model", "logs"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "weights").write_text("1")
    (tmp_path / "model" / "config.json").write_text("{}")
    settings = {"a": ["rows.txt", ("model", Path("logs"))], "rows.txt/": "logs/inner"}
    before = named_contents(settings)
    assert before.keys() == {"rows.txt", "model"}
    (tmp_path / "logs" / "inner" / "weights").write_text("2")
    assert named_contents(settings) == before
    (tmp_path / "model" / "inner" / "weights").write_text("2")
    after = named_contents(settings)
    assert (after["rows.txt"], after["model"] == before["model"]) == (before["rows.txt"], False)
    # A text may name the current folder by accident.
    (tmp_path / "settings.json").write_text("{}")
    assert not named_contents(["", ".", "/", str(tmp_path)])
    # None of these is a path.
    assert not named_contents(["~nobody of this machine", "a\0b", "x" * 5000, "", 3, None])
