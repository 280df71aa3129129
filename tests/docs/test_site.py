"""README.md and the pages of `docs/` run as they stand, lead where they say, and name everything that is public.

A page is a script: blocks with a title are files, Python blocks and the commands of console blocks run in the order of
the page. README.md, the site's first page and the tutorial run one after the other in one directory; each other page
runs in a copy of it. SmolLM2 is a tiny random model here, trainings take two steps, and the examples have a tenth of
their rows.
"""

import ast
import importlib
import io
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import generate_docs
import pytest
import yaml
from testbed.classifiers import build
from testbed.documents import ROOT, commands, few_examples, run_page, short, titled_blocks
from testbed.here import STUDY, work_here
from testbed.scripts import run_script

import modular_experts
from modular_experts import experts
from modular_experts.__main__ import VERBS
from modular_experts.discovery import import_systems
from modular_experts.library import Library, open_expert
from modular_experts.methods import METHODS

DOCS = ROOT / "docs"
GENERATED = {name for name in generate_docs.MAKERS if name.endswith(".md")}
WRITTEN = sorted({path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - GENERATED)
FIRST = ["README.md", "docs/index.md"]
FIRST += [f"docs/{page}" for _, page in generate_docs.nav() if page.startswith("tutorial/") and page in WRITTEN]
SCRIPTS = [page for page in WRITTEN if page.split("/")[0] in ("guides", "concepts", "systems")]


@contextmanager
def _reader(place: Path) -> Iterator[None]:
    """Be in a directory, where a study starts no processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", [str(place), *sys.path])
        patch.setattr(sys, "argv", ["modular-experts"])
        work_here(patch, *STUDY)
        yield


def _short_copy(source: str, target: str) -> None:
    Path(target).write_text(short(Path(source).read_text(encoding="utf-8")), encoding="utf-8")


class Walk(NamedTuple):
    """The directory of a reader who did what README.md, the first page and the tutorial say, and what that printed."""

    place: Path
    printed: dict[str, str]


@pytest.fixture(scope="module")
def walk(tmp_path_factory, tiny_llama_dir) -> Walk:
    place, printed = tmp_path_factory.mktemp("walk"), {}
    (place / ".cache").mkdir()
    (place / ".cache/smollm2").symlink_to(tiny_llama_dir)
    build("bert", place / ".cache/minilm")
    configs = shutil.copytree(ROOT / "configs", place.with_name("configs"), copy_function=_short_copy)
    (place / "configs").symlink_to(configs)
    few_examples(place)
    with _reader(place), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning says about a trainer that a reader makes
        for page in FIRST:
            with redirect_stdout(io.StringIO()) as out:
                run_page(page)
            printed[page] = out.getvalue()
    return Walk(place, printed)


def test_readme_and_tutorial_run_in_order_in_one_folder(walk: Walk) -> None:
    assert [page for page in FIRST if page.startswith("docs/tutorial/")][1:] == [
        f"docs/tutorial/{page}.md" for page in ("train", "merge", "evaluate", "route", "ship", "own-expert")
    ]
    made = {"dates", "mood", "both", "plural", "tuned", "ties", "only-dates", "chosen", "scale-both", "scale-chosen"}
    assert made <= set(Library(walk.place / "library"))
    assert set(Library(walk.place / "demo")) == {"dates", "mood", "both"}
    assert (walk.place / "merged-checkpoint/config.json").is_file()


def test_readme_shows_what_its_tour_prints(walk: Walk) -> None:
    page, lines = (ROOT / "README.md").read_text(encoding="utf-8"), walk.printed["README.md"].splitlines()
    verbs = [line.split()[1] for _, _, block in titled_blocks(page) for line in commands(block)]
    assert verbs == ["fit", "fit", "combine", "merge", "evaluate", "generate", "apply"]
    heads = [number for number, line in enumerate(lines) if line.startswith("model ")]
    (shown,) = (line for line in page.splitlines() if line.startswith("model  role"))
    of_command, of_python = ([line.split() for line in lines[head : head + 5]] for head in heads)
    # The interval stands beside the loss where no model scores, as here.
    assert sorted(shown.split()) == sorted(of_command[0])
    assert [row[0] for row in of_command[1:]] == ["base", "dates", "mood", "both"]
    assert of_python == of_command
    assert any("loaded again with transformers" in line for line in lines)


def test_no_two_pages_write_to_one_place() -> None:
    """Or the later one says that it overwrites."""
    pages: dict[str, set[str]] = {}
    for page in [*FIRST, *(f"docs/{page}" for page in SCRIPTS)]:
        for language, _, content in titled_blocks((ROOT / page).read_text(encoding="utf-8")):
            lines = commands(content) if language == "console" else content.splitlines()
            for line in lines if language in ("console", "yaml", "python") else []:
                if (found := re.search(r"(?:--out |^out: |out=\")([\w./-]+)", line)) and "overwrite" not in line:
                    pages.setdefault(found[1], set()).add(page)
    assert {"demo/both", "library/both"} <= set(pages)
    assert not {place: names for place, names in pages.items() if len(names) > 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", SCRIPTS)
def test_a_page_runs_from_top_to_bottom(page: str, walk: Walk, tmp_path: Path) -> None:
    shutil.copytree(walk.place, tmp_path / "here", symlinks=True)
    with _reader(tmp_path / "here"):
        run_page(f"docs/{page}")


def test_the_page_on_adapters_states_what_its_script_computes() -> None:
    page = (DOCS / "guides/peft-and-hub.md").read_text(encoding="utf-8")
    tables = run_script("adapters_7b.py")
    rows = [row for row in re.findall(r"^\| .* \|$", page, re.MULTILINE) if row in tables]
    assert len(rows) == 11


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as the site makes them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_link_and_anchor_leads_somewhere() -> None:
    texts = {page: (DOCS / page).read_text(encoding="utf-8") for page in WRITTEN} | generate_docs.pages()
    for page, text in texts.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"https?://|mailto:|data:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (DOCS / page).parent.joinpath(path).resolve().relative_to(DOCS).as_posix() if path else page
            assert target in texts or (DOCS / target).is_file(), f"{page}: {link} leads nowhere"
            assert not anchor or anchor in _anchors(texts[target]), f"{page}: {link} has no such heading"


def test_the_reference_has_every_public_name() -> None:
    reference = "\n".join((DOCS / page).read_text() for page in WRITTEN if page.startswith("reference/"))
    documented = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", reference, re.MULTILINE)}
    rooms = [importlib.import_module(f"modular_experts.{name}") for name in ("merging", "routing")]
    public = {name for module in (modular_experts, *rooms) for name in module.__all__}
    assert not {name for name in public if not name.startswith("__") and not name.isupper()} - documented
    for path, members in re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", reference, re.MULTILINE):
        found = pkgutil.resolve_name(path)
        for member in filter(None, members.split(", ")):
            assert hasattr(found, member) or member in found.__annotations__, f"{path} has no {member}"


def test_the_navigation_has_every_page_and_the_generated_ones_every_method_command_and_file() -> None:
    assert sorted(page for _, page in generate_docs.nav()) == sorted({*WRITTEN, *GENERATED})
    made = generate_docs.pages()
    assert set(re.findall(r"^## (\w+)$", made["reference/methods.md"], re.MULTILINE)) == set(METHODS)
    assert set(re.findall(r"^## ([\w-]+)$", made["reference/commands.md"], re.MULTILINE)) == set(VERBS)
    shown = made["reference/configs.md"]
    assert all(file.read_text().strip() in shown for file in (ROOT / "configs/merge").glob("*.yaml"))
    assert "Default" in made["reference/methods.md"]


def test_the_file_format_names_every_key(walk: Walk) -> None:
    page = (DOCS / "concepts/library.md").read_text()
    record = open_expert(walk.place / "library/dates").record
    assert not [key for key in record if f"`{key}`" not in page]


def test_the_site_is_built_anew_and_the_base_beside_the_cache_of_its_builder_stays(tmp_path: Path) -> None:
    """`make docs` in a small project with one public name; a base lies where `make smollm2` puts it."""
    programs = Path(sys.executable).parent
    if not (programs / "zensical").exists():
        pytest.skip("zensical builds the site; `make docs` brings it")
    config = {"site_name": "small", "plugins": [{"mkdocstrings": {"handlers": {"python": {"paths": ["."]}}}}]}
    files = {
        "Makefile": (ROOT / "Makefile").read_text(encoding="utf-8"),
        "mkdocs.yml": json.dumps(config),
        "docs/index.md": "# A name\n\n::: named.first\n",
        "scripts/generate_docs.py": "",
        ".cache/smollm2/model.safetensors": "the base",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for sentence in ("Count to one.", "Count to two."):
        (tmp_path / "named.py").write_text(f'def first():\n    """{sentence}"""\n', encoding="utf-8")
        command = ["make", "docs", f"BIN={programs}", "PIP=true", "RUNS="]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert sentence in (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert (tmp_path / ".cache/smollm2/model.safetensors").read_text() == "the base"


def test_the_site_asks_nobody_on_the_network_and_states_the_version_and_the_changes() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert config["theme"]["font"] == "false"
    assert "extra_javascript" not in config
    assert modular_experts.__version__ in config["copyright"]
    changes = generate_docs.changes_page()
    versions = re.findall(r"^## \[(.*?)\]", changes, re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == modular_experts.__version__


def test_the_page_on_experts_states_the_rate_of_each_type() -> None:
    page = (ROOT / "docs/concepts/expert.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `(\w+Expert)`.* \| ([\d.]+) \|$", page, re.MULTILINE))
    assert len(stated) == 9
    kinds = {name: kind for module in (experts, *import_systems()) for name, kind in vars(module).items()}
    rates = {name: kinds[name].learning_rate for name in stated}
    assert {name: float(rate) for name, rate in stated.items()} == rates


def test_the_page_of_failures_quotes_sentences_of_the_code() -> None:
    files = (ROOT / "modular_experts").rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    said = "\n".join(
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for node in nodes
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )
    page = (DOCS / "guides/failures.md").read_text(encoding="utf-8")
    quoted = [
        quote for cell in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE) for quote in re.findall("`(.*?)`", cell)
    ]
    parts = [part.strip(" ;:,") for quote in quoted for part in quote.split("...")]
    assert len(quoted) > 20
    assert not [part for part in parts if part not in said]


def test_the_page_on_the_code_names_tests_that_exist_and_files_with_what_is_in_them() -> None:
    page = (ROOT / "CODE.md").read_text(encoding="utf-8")
    for file, test in re.findall(r"`(tests/\S+\.py)::(\w+)`", page):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
    rows = re.findall(r"^\| .+ \| (`.+`) \| (`.+`) \|$", page, re.MULTILINE)
    assert len(rows) > 30
    for files, names in rows:
        defined = {
            file: _definitions((ROOT / "modular_experts" / file).read_text("utf-8"))
            for file in re.findall("`(.*?)`", files)
        }
        named = {*re.findall("`(.*?)`", names)}
        assert not named - set().union(*defined.values()), files
        assert all(named & of_file for of_file in defined.values()), f"a file of {files} defines none of {names}"


def _definitions(source: str) -> set[str]:
    """Return the names that a file defines: functions, classes and their methods, and constants."""
    definition = re.compile(r"^ *(?:async )?(?:def|class) (\w+)|^(\w+)(?:: .+)? = ", re.MULTILINE)
    return {function or constant for function, constant in definition.findall(source)}
