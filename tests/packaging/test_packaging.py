"""What is built holds what a user needs and nothing else, and the files around it are sound."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from testbed.documents import ROOT, few_examples

import modular_experts

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of a tree that was used: it has runs, caches and a model."""
    builder = pytest.importorskip("hatchling.build", reason="hatchling builds the package; `make install` brings it")
    place = tmp_path_factory.mktemp("used")
    for name in TRACKED:
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
    for junk in ("runs/quickstart/base/model.safetensors", ".cache/smollm2/model.safetensors", ".venv/bin/python"):
        (place / junk).parent.mkdir(parents=True)
        (place / junk).write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        builder.build_sdist("dist")
        builder.build_wheel("dist")
    return place / "dist"


def test_the_wheel_holds_the_package_and_its_data_and_the_source_distribution_what_is_tracked(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode())
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert names == {name for name in TRACKED if name.startswith("modular_experts/")}
    assert {"modular_experts/py.typed", "modular_experts/native/sparse_passes.cpp"} <= names
    assert (about["Name"], about["Version"]) == ("modular-experts", modular_experts.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names == {*TRACKED, "PKG-INFO"}


def test_every_package_that_is_imported_is_asked_for() -> None:
    """Or it belongs to an extra and is imported inside of a function, which also holds for the files of a server."""
    served = {"fastapi", "httpx", "prometheus_client", "pydantic", "starlette"}  # two come with FastAPI
    assert {re.split("[<>=]", line)[0] for line in PROJECT["optional-dependencies"]["serve"]} >= {"fastapi", "httpx"}
    asked = {re.split(r"[\[>=<;~ ]", line)[0].lower() for line in PROJECT["dependencies"]}
    # PyYAML; two come with transformers, and jinja2 with torch.
    asked |= {"modular_experts", "yaml", "tokenizers", "numpy", "jinja2", *sys.stdlib_module_names}
    for name in TRACKED:
        if name.startswith("modular_experts/") and name.endswith(".py"):
            for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
                named = [node.module] if isinstance(node, ast.ImportFrom) else []
                named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                own = served if "/serving/" in name else set()
                assert not {module.split(".")[0] for module in named} - asked - own, name


def test_the_citation_names_this_version_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == modular_experts.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert len(cited["preferred-citation"]["authors"]) == 9
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_is_well_formed_and_calls_targets_that_exist(file: Path) -> None:
    flow = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)  # a safe loader reads the key `on` as true
    assert {"name", "on", "permissions", "jobs"} <= set(flow)
    assert flow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name, job in flow["jobs"].items():
        assert {"runs-on", "steps"} <= set(job), name
        assert job.get("needs", name) in flow["jobs"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", step.get("uses", "a/b@v1")), step
            for target in re.findall(r"\bmake ([a-z0-9-]+)", step.get("run", "")):
                assert target in targets


def test_only_the_publishing_job_may_ask_for_an_identity() -> None:
    flow = yaml.load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert flow["on"] == {"push": {"tags": ["v*"]}}


def _environment(built: Path, place: Path) -> tuple[Path, dict[str, str]]:
    """Make an environment that has the wheel, and of this one only the packages it depends on."""
    environment = place / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", next(built.glob("*.whl"))], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # `list` breaks long names at the width of a terminal, and COLUMNS would be one.
    return environment, {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")}


@pytest.mark.quickstart
def test_the_wheel_alone_runs_the_tutorial(built: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    """All of its pages in one process, on a tiny base, with short trainings and few rows."""
    environment, clean = _environment(built, tmp_path)
    here = tmp_path / "here"
    (here / ".cache").mkdir(parents=True)
    (here / ".cache/smollm2").symlink_to(tiny_llama_dir)
    few_examples(here)
    pages = ("index", "train", "merge", "evaluate", "route", "ship", "own-expert")
    (tmp_path / "run.py").write_text(
        f"""
import sys
import modular_experts
from testbed.documents import run_page
assert modular_experts.__file__.startswith(sys.prefix)
sys.path.insert(0, ".")
sys.argv = ["modular-experts"]
for page in {pages}:
    run_page(f"docs/tutorial/{{page}}.md")
"""
    )
    command = [environment / "bin/python", tmp_path / "run.py"]
    subprocess.run(command, cwd=here, env=clean | {"PYTHONPATH": str(ROOT / "tests")}, check=True)
    assert (here / "checkpoint/config.json").is_file()
    assert {path.name for path in (here / "library").iterdir()} >= {"dates", "both", "chosen", "median-of-three"}


@pytest.mark.quickstart
def test_the_wheel_alone_runs_a_tiny_quickstart(built: Path, tmp_path: Path) -> None:
    """In an environment that has the wheel, and of this one only the packages it depends on."""
    environment, clean = _environment(built, tmp_path)
    python = environment / "bin/python"
    sizes = "width=16, rows=4, target=2.0, limit=4, decay=2, validation=1, test=1"
    (tmp_path / "tiny.py").write_text(
        f"""
from pathlib import Path
from modular_experts.study.quickstart import Sizes, description, run_quickstart
from modular_experts.study import results_of
from modular_experts.study.report import write_report
if __name__ == "__main__":
    described = description(tasks=2)
    described["fit"]["steps"] = 1
    study, state = run_quickstart(described, Path("run"), Sizes({sizes}))
    write_report(results_of(study, state), Path("report.html"))
"""
    )
    subprocess.run([python, "tiny.py"], cwd=tmp_path, env=clean, check=True)
    assert "</html>" in (tmp_path / "report.html").read_text()
    command = [environment / "bin/modular-experts", "list", "run/library"]
    listed = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert "merge-sparse-SparseAverage" in listed.stdout
    where = "import modular_experts, sys; sys.exit(not modular_experts.__file__.startswith(sys.prefix))"
    subprocess.run([python, "-c", where], cwd=tmp_path, env=clean, check=True)
