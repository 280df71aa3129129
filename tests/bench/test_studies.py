"""The studies of `benchmarks/studies/` fit together, and one of them runs from its files to its table."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from testbed.classifiers import build
from testbed.here import STUDY, work_here
from testbed.scripts import BENCHMARKS, run_script

from modular_experts.__main__ import main
from modular_experts.methods import METHODS
from modular_experts.reports import Results

STUDIES = BENCHMARKS / "studies"
SHARED = {"suite", "ten-tasks", "real", "real-kinds"}
OF_REAL_TASKS = {"few-bytes", "quantised"}
TEN_TASKS = {"selection", "training", "training-under", "related-experts", "mixtures"}
SMALL = {
    "tasks": {
        "held_in": [{"name": name, "source": name, "cap": 8} for name in ("Reverse", "Upper")],
        "held_out": ["RotateRight"],
    },
    "fit": {"modules": "all-linear", "steps": 2, "batch_size": 2},
    "experts": {
        "sparse": {"expert": "SparseExpert", "grid": {"learning_rate": [0.001, 0.01]}},
        "molora": {"joint": True, "expert": {"class_path": "MoLoRAExpert", "init_args": {"experts": 2, "rank": 1}}},
    },
    "merges": [{"method": ["SparseAverage", "IsoC"]}, {"shrink": "int4"}],
    "measures": {"overlap": "benchmarks.measures.overlap"},
    "seeds": [0, 1],
    "data": {"eval_limit": 2, "eval_batch_size": 8},
    "out": "runs/small",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, one_block: Path) -> Iterator[Path]:
    """A folder with the bases and the task files that the studies name."""
    place = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        work_here(patch, *STUDY)
        Path("benchmarks").symlink_to(BENCHMARKS)
        for base in [*(f"runs/quickstart-{seed}/base" for seed in (0, 1, 2)), ".cache/smollm2"]:
            Path(base).parent.mkdir(parents=True, exist_ok=True)
            Path(base).symlink_to(one_block)
        build("bert", Path(".cache/minilm"))
        Path("data").mkdir()
        for file in re.findall(r"data/\w+\.jsonl", (STUDIES / "real.yaml").read_text()):
            write_rows(Path(file), [{"input": f"say {number}", "target": "a"} for number in range(20)])
        yield place


def study(*configs: str, status: bool = False) -> None:
    words = [word for config in configs for word in ("--config", config)]
    assert main(["study", *words, *["--status"] * status]) == 0


def file(name: str) -> str:
    return f"benchmarks/studies/{name}.yaml"


def short(name: str) -> str:
    """Write a study with the first learning rate of each grid: the others are read as it is."""
    text = (STUDIES / f"{name}.yaml").read_text()
    Path(f"{name}.yaml").write_text(re.sub(r"(learning_rate: (?:&\w+ )?\[[^],]*)[^]]*", r"\1", text))
    return f"{name}.yaml"


OF_SUITE = sorted({one.stem for one in STUDIES.glob("*.yaml")} - SHARED - OF_REAL_TASKS - {"minilm"})
TOGETHER = [["suite", *["ten-tasks"] * (name in TEN_TASKS), name] for name in OF_SUITE]
TOGETHER += [["real", "merging", "real-kinds"], ["real", "routing", "real-kinds"], ["real", "few-bytes"], ["minilm"]]


@pytest.mark.parametrize("names", TOGETHER, ids=" ".join)
def test_the_files_of_each_study_fit(place: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    study(*map(short, names), status=True)
    assert re.search(r"^tests +0 of \d\d+ done", capsys.readouterr().out, re.MULTILINE)


def test_the_study_of_merges_has_every_method() -> None:
    text = (STUDIES / "merging.yaml").read_text()
    left_out = {"Difference", "Intersection", "TALLMask"}  # they are not meant to keep all experts
    assert {name for name in METHODS if not re.search(rf"\b{name}\b", text)} == left_out


@pytest.mark.filterwarnings("ignore")  # what Lightning says of few steps
def test_a_study_runs_from_its_files_to_its_table(place: Path) -> None:
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    study(file("suite"), "small.yaml")
    results = Results.read("runs/small/results.json")
    assert results.facts["kinds"] == ["sparse-0.001", "sparse-0.01"]
    assert {row["seed"] for row in results.where(model="base").rows} == {0, 1}, "each seed has a base"
    assert len(results.where(metric="overlap", kind="sparse-0.01").rows) == 2 * 2

    shown = run_script("tables.py", "runs/small", "--beside", "SparseAverage", "--cell", "{low:.1f} {kept:.0f}")
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert head == ["merge", "base", "molora", "sparse-0.001", "sparse-0.01"]
    assert [line[0] for line in lines] == ["alone", "SparseAverage", "IsoC", "int4"]
    assert lines[1][1:3] == ["", ""], "an expert of all tasks is in no merge"
    assert lines[1][3].startswith("0.0 "), "the line that others are compared with"
    lines = run_script("tables.py", "runs/small", "--cell", "{size}").splitlines()[2::3]
    sizes = [float(line.split("|")[4]) for line in lines]
    assert 0 < sizes[1] < 0.6 * sizes[0], "int4 takes fewer bytes than float32"
    shown = run_script("tables.py", "runs/small", "--lines", "kind", "--columns", "merge", "--cell", "{rank[overlap]}")
    kinds = ["| base", "| molora", "| sparse-0.001", "| sparse-0.01"]
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:]] == kinds
    with pytest.raises(SystemExit, match="there is no such line"):
        run_script("tables.py", "runs/small", "--beside", "TIES")


def test_a_rank_correlation_is_that_of_ranks_and_shares_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from tables import rank_correlation
    from torch import tensor

    one, other = tensor([1.0, 2, 3, 4, 5]), tensor([5.0, 6, 7, 8, 7])
    assert rank_correlation(one, other) == pytest.approx(0.820782681668123)  # ties take their mean rank
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, tensor([1.0] * 5)) == 0
