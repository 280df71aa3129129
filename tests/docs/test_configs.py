"""Every file in configs/ runs as it stands in the directory that `modular-experts quickstart` was run in.

The paper's configs need a hub and a GPU; `test_paper_configs.py` runs them on a tiny model.
"""

import re
import sys
from pathlib import Path

import pytest
from conftest import write_rows

from modular_experts.__main__ import main
from modular_experts.library import Library, StoredExpert, open_expert
from modular_experts.merging.statistics import KINDS
from modular_experts.reports import Results

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = Path("runs/quickstart")
NEEDED = {"sparse-reverse": "sparse", "sparse-upper": "sparse-element", "lora-next": "lora"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama_dir) -> Path:
    """A directory as the quickstart leaves it, with a random base and experts of two steps."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["modular-experts"])
        QUICKSTART.mkdir(parents=True)
        (QUICKSTART / "base").symlink_to(tiny_llama_dir)
        for name, config in NEEDED.items():
            made = _fitted(config)
            (QUICKSTART / "library").mkdir(exist_ok=True)
            made.path.rename(QUICKSTART / "library" / name)
        experts = str([str(QUICKSTART / "library" / name) for name in NEEDED])
        out = str(QUICKSTART / "library" / "merge-sparse-SparseAverage")
        assert main(["merge", "--experts", experts, "--method", "SparseAverage", "--out", out]) == 0
        for kind in set(KINDS) - {"gates"}:  # some of configs/merge say that they need them; gates are trained by `fit`
            taken = ["statistics", "--config", str(CONFIGS / "statistics.yaml"), "--kind", kind, "--eval_limit", "4"]
            assert main(taken) == 0
    return place


@pytest.fixture(autouse=True)
def _in_place(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])


def _fitted(config: str) -> StoredExpert:
    """Return the expert of a config that was trained for two steps and chosen on two validation rows of each task."""
    before = set(Library("library")) if Path("library").exists() else set()
    words = ["--trainer.max_steps", "2", "--eval_limit", "2"]
    assert main(["fit", "--config", str(CONFIGS / "fit" / f"{config}.yaml"), *words]) == 0
    (name,) = set(Library("library")) - before
    made = Library("library")[name]
    assert made.record["hyperparameters"]["steps"] == 2
    return made


@pytest.mark.parametrize("config", sorted({one.stem for one in (CONFIGS / "fit").glob("*.yaml")} - {*NEEDED.values()}))
def test_fit_config_trains_and_exports(config: str) -> None:
    """The fixture `place` does so with the others, which the tests of merges need."""
    _fitted(config)


@pytest.mark.parametrize("config", sorted((CONFIGS / "merge").glob("*.yaml")), ids=lambda file: file.stem)
def test_merge_config_merges(config: Path) -> None:
    assert main(["merge", "--config", str(config)]) == 0
    if config.stem == "checkpoint":
        assert Path("merged-checkpoint/model.safetensors").is_file()
        return
    merged = open_expert(f"library/{config.stem}")
    assert [parent["name"] for parent in merged.record["parents"]] == list(NEEDED)
    if config.stem == "per-weight":
        assert not [name for name in merged if ".0." in name], "the rules by pattern leave the first layer alone"


def test_the_comparison_compares() -> None:
    assert main(["evaluate", "--config", str(CONFIGS / "evaluate.yaml"), "--eval_limit", "4"]) == 0
    assert Results.read("runs/comparison/results.json").values("model") == ["base", "alone", "merged"]


COEFFICIENTS = sorted(file for file in (CONFIGS / "search").glob("*.yaml") if file.stem != "paths")


@pytest.mark.parametrize("config", COEFFICIENTS, ids=lambda file: file.stem)
def test_search_config_searches(config: Path) -> None:
    assert main(["search", "--config", str(config), "--algorithm.steps", "3", "--rows", "8"]) == 0
    found = open_expert(f"library/{config.stem}")
    merges = [f"{config.stem}-{name}" for name in ("RegMean", "SparseAverage") if config.stem in ("atlas", "by-row")]
    assert [parent["name"] for parent in found.record["parents"]] == [*merges, *NEEDED]


def test_the_studies_are_read(capsys) -> None:
    """Their experts, merges and searches are tested in `tests/study`."""
    Path(".cache").mkdir(exist_ok=True)
    Path(".cache/smollm2").symlink_to((QUICKSTART / "base").resolve())
    for name in re.findall(r"data/\w+.jsonl", (CONFIGS / "paper/small.yaml").read_text()):
        Path("data").mkdir(exist_ok=True)
        write_rows(Path(name), [{"input": name, "target": "a", "split": "test"}])
    for file in ("study/suite", "study/tradeoffs", "study/bytes", "paper/tiny", "paper/small"):
        assert main(["study", "--config", str(CONFIGS / f"{file}.yaml"), "--status"]) == 0
        assert re.search(r"^experts +0 of [1-9]\d* done$", capsys.readouterr().out, re.MULTILINE)


def test_the_study_of_phi_3_lacks_nothing_but_its_base(capsys, monkeypatch) -> None:
    Path("configs").symlink_to(CONFIGS)
    words = ["study", "--config", "configs/paper/phi-3-mini.yaml", "--status"]
    assert main([*words, "--base", str(QUICKSTART / "base")]) == 0
    # 4 kinds of 20 experts and the multitask one; 15 merges of 10 pairs, 10 fives, 10 tens and all.
    shown = capsys.readouterr().out
    assert "experts     0 of 81 done" in shown
    assert "merges      0 of 465 done" in shown
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "microsoft/Phi-3-mini-4k-instruct" in error
    assert error.count("\n") == 1


def test_the_test_config_tests(capsys) -> None:
    test = ["test", "--config", str(CONFIGS / "test.yaml"), "--model.max_new_tokens", "4", "--eval_limit", "4"]
    for applied in ([], ["--model.applied", f"[{QUICKSTART}/library/merge-sparse-SparseAverage]"]):
        assert main([*test, *applied]) == 0
        assert "held-out" in capsys.readouterr().out


def test_no_config_is_left_out() -> None:
    found = {str(file.relative_to(CONFIGS).parent) for file in CONFIGS.rglob("*.yaml")}
    assert found == {".", "compress", "fit", "gpu", "merge", "search", "study", "paper"}
